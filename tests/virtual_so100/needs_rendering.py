"""Skips the test module that imports it where MuJoCo cannot render, and says what to install."""

import pytest
from lerobot_env_virtual_so100.scene import check_rendering

try:
    check_rendering()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)
