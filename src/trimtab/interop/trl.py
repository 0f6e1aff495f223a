"""Supervised fine-tuning of an attached model with TRL."""

from __future__ import annotations

from typing import Any

from trimtab.extras import require
from trimtab.interop.transformers import AdapterTraining

_trl: Any = require("trl", "trl")


class TrimtabSFTTrainer(AdapterTraining, _trl.SFTTrainer):
    """TRL's SFTTrainer for a model with an attached adapter; the arguments are the same, without `peft_config`."""
