"""How the files beside this one were made, with adapters 1.3.0 on transformers 4.57.6 (which it asks for, and which the
tests do not have): a tiny Llama, adapters with random numbers as the library saves them, its logits with each, and its
losses in ten steps of training from there.

usage: python make.py DIRECTORY
"""

import sys
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=5, scaling="channel", leave_out=[0], non_linearity="gelu"),
    "parallel": ParBnConfig(reduction_factor=4),
    "learned": ParBnConfig(reduction_factor=2.5, scaling="learned", non_linearity="leakyrelu"),
}
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def losses(model, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of ten steps from the adapter as it was saved."""
    model.train_adapter(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


def main(directory: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.save_pretrained(directory / "model")
    (directory / "model" / "generation_config.json").unlink()
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 7))
    results = {"tokens": tokens, "none": model(tokens).logits.detach()}
    adapters.init(model)
    for name, config in CONFIGS.items():
        model.add_adapter(name, config=config)
        model.set_active_adapters(name)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if f".adapters.{name}." in key:
                    weight += 0.3 * torch.randn_like(weight)
        model.save_adapter(str(directory / name), name, with_head=False, use_safetensors=True)
        results[name] = model.eval()(tokens).logits.detach()
        results[f"{name} losses"] = losses(model, name, tokens)
        model.delete_adapter(name)
    save_file(results, directory / "logits.safetensors")


main(Path(sys.argv[1]))
