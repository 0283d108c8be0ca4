"""Low-rank adapters: added to be trained, or read from a LoRA file that is the thing to be cleaned."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmbackdoor.types import InputError

ADAPTER = "mmbackdoor"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(module: nn.Module, rank: int, targets: Sequence[str] = TARGETS) -> dict[str, nn.Parameter]:
    """Put rank-`rank` adapters, which change nothing yet, on every layer that ends like one of `targets`, by default
    the attention projections of a UNet; return their parameters."""
    if rank < 1:
        raise InputError(f"the LoRA rank {rank} is not positive")
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=list(targets))
    module.add_adapter(config, ADAPTER)
    return adapter_parameters(module)


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The low-rank factors in `module`, by name."""
    return {name: value for name, value in module.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The weights of `module` under their original names, with every active adapter added in."""
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in module.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            weight = state[f"{name}.weight"]
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            state[f"{name}.weight"] = weight
    return {name: value.detach() for name, value in state.items()}
