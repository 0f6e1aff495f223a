"""Methods: one file each, found by existing."""
