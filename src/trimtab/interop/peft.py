"""Exchange with huggingface/peft: folders with adapter_config.json and adapter_model.safetensors; needs no peft."""

from __future__ import annotations

from trimtab.interop.peft_export import ExportReceipt, export_lora
from trimtab.interop.peft_import import import_adapter, is_classifier, rows_of

__all__ = ["ExportReceipt", "export_lora", "import_adapter", "is_classifier", "rows_of"]
