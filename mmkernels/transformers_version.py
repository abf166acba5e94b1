"""Which versions of transformers work here, and the errors for those that do not."""

from __future__ import annotations

import re
from types import ModuleType

OLDEST, BELOW = (5, 17), (6, 0)
"""As in pyproject.toml, which pip reads only for ``mmkernels[models]``."""

RANGE = ">={}.{},<{}".format(*OLDEST, BELOW[0])


class VersionError(ImportError):
    """The installed transformers is of a version that mmkernels is not written for."""


def import_transformers(what: str) -> ModuleType:
    """Returns the package.

    Args:
        what: what needs it, for the error.

    Raises:
        VersionError: it is too old or too new.
        ImportError: it is not installed, or its own import fails.
    """
    try:
        import transformers
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        reason = "" if missing else f" (its import fails: {error})"
        raise ImportError(f'{what} needs transformers: pip install "mmkernels[models]"{reason}') from error
    version = str(getattr(transformers, "__version__", "a package without a version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        raise VersionError(f'{what} needs transformers {RANGE}, got {version}: pip install "transformers{RANGE}"')
    return transformers
