"""The simulator of csrc_sim: right kernels pass in it, and faults of kernels are reported without a sanitizer's help.

What only the sanitizers find is in tests/sanitizers/test_simulator.py.
"""

from __future__ import annotations

import pytest
from simulator.build import COMPILERS, ORDERS, WARP_SIZES, build, fault_line, run

WRONG_RESULT, THROWN = 3, 4

WRONG = (
    "missing_barrier",
    "static_shared_memory_read_before_written",
    "dynamic_shared_memory_read_before_written",
)
"""Faults that show in the result, whatever the order of the lanes."""

LATE_COPIES, LATE_PRODUCTS = "reverse", "forward"

UNAWAITED = {
    "copy_read_before_it_is_waited_for": (LATE_COPIES, WRONG_RESULT),
    "copy_over_what_is_still_read": (LATE_PRODUCTS, WRONG_RESULT),
    "sums_read_before_their_product_is_done": (LATE_PRODUCTS, WRONG_RESULT),
    "operand_overwritten_before_its_product_is_done": (LATE_PRODUCTS, WRONG_RESULT),
    "copy_over_what_a_product_reads": (LATE_PRODUCTS, WRONG_RESULT),
    "return_before_products_are_done": (LATE_PRODUCTS, THROWN),
}
"""Faults that show by when copies and products happen that a thread has started: the order of the two in which they do,
and how."""

REPORTED = {
    "thread_missing_at_a_barrier": ("threads 0-4, 6-63: at __syncthreads", "thread 5: returned"),
    "different_barriers": ("at another barrier than others", "__syncthreads"),
    "lanes_at_different_shuffles": ("in different operations", "__shfl_xor_sync"),
    "shuffle_while_a_lane_is_at_a_barrier": ("thread 7: at __syncthreads", "at __shfl_xor"),
    "shuffle_from_a_lane_that_has_returned": ("__shfl_sync of lane", "reads lane 3, which has returned"),
    "shuffle_from_a_lane_outside_the_mask": ("__shfl_sync of lane", "reads lane 9, which"),
    "different_masks": ("have different masks", "__any_sync"),
    "lane_outside_its_own_mask": ("which is not in its mask", "__any_sync"),
    "trap": ("__trap() was called", "thread (9, 0, 0)"),
}
"""Faults that a launch throws for, and what it says."""

pytestmark = pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler: g++ or clang++")


@pytest.fixture(scope="module", params=COMPILERS)
def program(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("simulator") / "program", compiler=request.param)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warp_size", WARP_SIZES)
def test_kernels_without_a_fault_pass(program, warp_size, order):
    assert run(program, "right", warp_size, order) == (0, "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("case", WRONG)
def test_a_fault_shows_in_the_result(program, case, warp_size, order):
    status, output = run(program, case, warp_size, order)
    assert status == WRONG_RESULT, output


@pytest.mark.parametrize("warp_size", WARP_SIZES)
def test_another_order_of_lanes_shows_what_relies_on_one(program, warp_size):
    statuses = {order: run(program, "order_taken_for_granted", warp_size, order)[0] for order in ORDERS}
    assert statuses == {"forward": 0, "reverse": WRONG_RESULT, "shuffled:1": WRONG_RESULT}


@pytest.mark.parametrize("case", UNAWAITED)
def test_what_is_started_and_not_waited_for_shows_in_one_order_and_in_a_shuffled_one(program, case):
    order, status = UNAWAITED[case]
    statuses = {each: run(program, case, 32, each)[0] for each in ORDERS}
    assert statuses == {"forward": 0, "reverse": 0, order: status, "shuffled:1": status}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("case", REPORTED)
def test_a_launch_reports_the_fault_and_its_place(program, case, warp_size, order):
    status, output = run(program, case, warp_size, order)
    assert status == THROWN, output
    for words in (*REPORTED[case], fault_line(case), "block ("):
        assert words in output


def test_a_mask_of_32_bits_is_right_in_a_warp_of_32_only(program):
    assert run(program, "mask_of_32_bits", 32, "forward") == (0, "")
    status, output = run(program, "mask_of_32_bits", 64, "forward")
    assert status == THROWN
    assert "a mask of 32 bits in a warp of 64 lanes" in output
    assert fault_line("mask_of_32_bits") in output


@pytest.mark.parametrize(
    ("warp_size", "order", "accepted"),
    [
        (48, "forward", "32 or 64 lanes, not 48"),
        (32, "backward", "forward, reverse or shuffled:SEED, not 'backward'"),
        (32, "shuffled:", "not 'shuffled:'"),
        (32, "shuffled:x", "not 'shuffled:x'"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(program, warp_size, order, accepted):
    status, output = run(program, "right", warp_size, order)
    assert status == 2
    assert accepted in output
