"""Whether the model hub can be asked, found out in seconds instead of by a minute of retries."""

from __future__ import annotations

import urllib.error
import urllib.request

from trimtab.extras import require


def hub_is_reachable(timeout: float = 10.0) -> bool:
    """Return whether the hub answers within `timeout` seconds; False when offline mode is set (HF_HUB_OFFLINE)."""
    constants = require("huggingface_hub.constants", "hf")
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answered, if only to refuse
    except (OSError, ValueError):
        return False
