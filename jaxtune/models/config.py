"""What the one decoder is told about a model: the settings that change its mathematics, and nothing else."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, named as Hugging Face's `rope_parameters` name it."""

    type: str = "default"  # default | linear | dynamic | yarn | llama3
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    tied: bool = False  # the head is the embedding
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's q and k, before the rotation
    rope: Rope = Rope()
    windows: tuple[int | None, ...] = ()  # by layer: how many positions back a token sees, itself counted; None: all
    init_std: float = 0.02
    hf: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)  # the config.json it came from

    @property
    def layer_weights(self) -> int:
        """Numbers of a layer's matrices."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def matmul_weights(self) -> int:
        """Numbers that multiply every token: the layers' matrices and the head."""
        return self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size
