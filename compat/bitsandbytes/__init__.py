"""bnb_core under the name bitsandbytes, for every program in this environment."""

from bnb_core.compat import serve_installed_package

serve_installed_package()
