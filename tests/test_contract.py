"""The executable contract on every method, and the contract itself: a wrong declaration fails.

`test_smoke` holds every method against every quick invariant on the first built-in model that accepts it. With
`-m slow`, every method meets every invariant on every model of the zoo, each as a test of its own; these tests, tens of
thousands, are made only when slow ones are asked for. A new method joins by existing. A refusal is a skip that shows
its text; that no method and no promise is refused everywhere is a test of its own.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from contract_cases import CASE_NAMES, zoo_cases
from trimtab.activations import ActivationSite
from trimtab.check import INVARIANTS, Case, ContractViolation, attaches, built_in_cases, check_invariant, run_contract
from trimtab.contract.case import NotApplicable
from trimtab.contract.instances import small_instance
from trimtab.contract.processes import loads_in_a_new_process, trains_distributed
from trimtab.contract.report import Outcome
from trimtab.method import Method, methods
from trimtab.methods.weight.lora import LoRA
