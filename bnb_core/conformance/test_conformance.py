"""The suite as pytest tests: one for each case, and one that no promised class is without a case."""

from __future__ import annotations

import pytest

from bnb_core.conformance import runner
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.suite import all_cases, required_classes


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_case(
    case: Case, context: Context, expected_failures: runner.ExpectedFailures, request: pytest.FixtureRequest
) -> None:
    if case.large and not request.config.option.thorough:
        pytest.skip("needs gigabytes or minutes: run with --thorough")
    result = runner.run_case(case, context, expected_failures.reason(case))
    if result.status == "skipped":
        pytest.skip(result.message)
    if result.status == "expected failure":
        pytest.xfail(result.message)
    assert not result.failed, result.message


def test_every_promised_class_has_a_case() -> None:
    assert runner.coverage_gaps(all_cases(), required_classes()) == []


def test_every_expected_failure_names_a_case(expected_failures: runner.ExpectedFailures) -> None:
    assert expected_failures.dead(all_cases()) == []
