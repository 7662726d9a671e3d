"""The models and batches that every tool measures: Llamas of several sizes, trained briefly on Python source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CHARACTERS = 4_000_000  # of text


@dataclass(frozen=True)
class Size:
    """A Llama, the shape of the batch that its Hessian is measured on, and its training beforehand.

    Batches are large enough that products are compute-bound from 1M parameters on (CPU) and from 124M on (GPU).
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    batch: int
    length: int
    training_steps: int = 300
    learning_rate: float = 1e-3


SIZES = {
    "tiny": Size(128, 8, 24, 2, 2, 2, batch=4, length=16, learning_rate=1e-2),
    "1M": Size(256, 128, 352, 5, 4, 4, batch=8, length=64, learning_rate=3e-3),
    "10M": Size(256, 320, 864, 8, 5, 5, batch=4, length=64, training_steps=200),
    "12M": Size(4096, 384, 1024, 6, 6, 6, batch=8, length=128),
    "124M": Size(50304, 768, 2048, 12, 12, 12, batch=8, length=256, training_steps=100, learning_rate=3e-4),
    # Writing and reading weights of this size takes longer than the measurements, so they stay random.
    "1.2B": Size(128256, 2048, 8192, 16, 32, 8, batch=4, length=256, training_steps=0),
}


@dataclass
class Case:
    """A model and one batch of token ids (rows, length) on the model's device, the same for every tool."""

    model: nn.Module
    ids: torch.Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the order of `model.parameters()`, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def dimension(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    def batches(self, count: int = 1) -> list[dict[str, torch.Tensor]]:
        """Hugging Face batches, each of the same ids."""
        return [{"input_ids": self.ids, "labels": self.ids} for _ in range(count)]

    def loss(self) -> torch.Tensor:
        """Mean next-token cross-entropy, as the model itself computes it."""
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def gradient(self, **options: bool) -> tuple[torch.Tensor, ...]:
        """dL/d theta by one forward and one backward pass. options: those of torch.autograd.grad."""
        return torch.autograd.grad(self.loss(), self.parameters, **options)

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A flat vector (n,) as tensors shaped like the parameters."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """H v with the graph of the gradient rebuilt, (n,): the reference for every other product."""
        gradient = self.gradient(create_graph=True, materialize_grads=True)
        parts = torch.autograd.grad(gradient, self.parameters, self.split(vector), materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def vector(self, seed: int = 0) -> torch.Tensor:
        """A unit vector (n,), the same for every tool and precision on one kind of device."""
        source = torch.Generator(self.device).manual_seed(seed)
        v = torch.randn(self.dimension, generator=source, device=self.device).to(self.dtype)
        return v / torch.linalg.vector_norm(v, dtype=torch.float64).to(self.dtype)


class Logits(nn.Module):
    """The model as a classifier, for libraries that expect one: token ids to logits (tokens, vocabulary)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits.flatten(0, 1)


def targets(ids: torch.Tensor) -> torch.Tensor:
    """For each token the next one, -100 (not counted) after the last of a row, (tokens,)."""
    return nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()


def build(name: str, bits: int, *, seed: int = 0) -> nn.Module:
    """The Llama of this size with random weights, quantized below 16 bits, in evaluation mode; no downloads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[name]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    if bits < 16:
        import qat

        qat.quantize_model(model, qat.QuantConfig(bits=bits))
    return model.eval()


def text_tokens(vocabulary: int) -> torch.Tensor:
    """Source code of Python's standard library as token ids of one byte, or of two for a large vocabulary."""
    from qat.text.corpus import standard_library

    parts: list[str] = []
    for document in standard_library().train:
        parts.append(document)
        if sum(map(len, parts)) > CHARACTERS:
            break
    ids = torch.frombuffer(bytearray("".join(parts).encode()), dtype=torch.uint8).long()
    if vocabulary > 256:
        ids = ids[: len(ids) // 2 * 2].view(-1, 2) @ torch.tensor([256, 1])
    return ids % vocabulary


def random_rows(ids: torch.Tensor, size: Size, *, seed: int) -> Iterator[torch.Tensor]:
    """An endless sequence of batches (batch, length) from random places of the text."""
    source = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - size.length, (size.batch, 1), generator=source)
        yield ids[starts + torch.arange(size.length)]


def train(case: Case, rows: Iterator[torch.Tensor], size: Size) -> float | None:
    """Train in place for a few steps, so that the spectrum is that of a trained model.

    Returns the last loss, None without training.
    """
    if not size.training_steps:
        return None
    optimizer = torch.optim.AdamW(case.parameters, lr=size.learning_rate, weight_decay=0.0)
    # warmup over the first twentieth, then decay to zero: without them one eigenvalue dominates the spectrum
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (size.training_steps / 20)) * (1 - step / size.training_steps)
    )
    value = math.nan
    for _ in range(size.training_steps):
        ids = next(rows).to(case.device)
        loss = case.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(case.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
    return value


def state_path(folder: Path, name: str, bits: int) -> Path:
    return folder / f"{name}-{bits}bit.pt"


def prepare(name: str, bits: int, folder: Path, device: torch.device) -> float | None:
    """Train, and save weights and batch in `folder` for the processes that measure. Returns the last training loss."""
    size = SIZES[name]
    model = build(name, bits).to(device)
    tokens = text_tokens(size.vocabulary)
    loss = train(
        Case(model, next(random_rows(tokens, size, seed=0)).to(device)), random_rows(tokens, size, seed=1), size
    )
    state = {key: value.cpu() for key, value in model.state_dict().items()} if size.training_steps else None
    torch.save({"state": state, "ids": next(random_rows(tokens, size, seed=0))}, state_path(folder, name, bits))
    return loss


def load(name: str, bits: int, folder: Path, device: torch.device, dtype: str) -> Case:
    """The model and batch that `prepare` saved."""
    kept = torch.load(state_path(folder, name, bits), weights_only=True)
    model = build(name, bits)
    if kept["state"] is not None:
        model.load_state_dict(kept["state"])
    return Case(model.to(device, DTYPES[dtype]).eval(), kept["ids"].to(device))
