"""Other libraries' notices that are not about the user's run."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Lightning's notices and deprecation warnings of the libraries below are not shown."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for module in ("lightning", "torch", "bitsandbytes", "peft", "transformers", "tqdm"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
