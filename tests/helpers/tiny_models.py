"""Networks small enough for a dense Hessian, and batches for them."""

import torch
from oracles import generator
from torch import nn

VOCABULARY = 24
ARCHITECTURES = ("llama", "llama-tied", "gpt2", "qwen3", "gpt-neox", "opt")


def mlp(seed=0, *, inputs=4, hidden=6, outputs=3, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).to(dtype)


def regression(rows, *, seed=1, inputs=4, outputs=3):
    """One (inputs, targets) batch for each entry of rows; the targets of later batches are larger."""
    g = generator(seed)
    out = []
    for position, count in enumerate(rows):
        targets = torch.randn(count, outputs, dtype=torch.float64, generator=g) * (1 + 3 * position)
        out.append((torch.randn(count, inputs, dtype=torch.float64, generator=g), targets))
    return out


def classification(rows, *, seed=1, inputs=4, classes=3):
    g = generator(seed)
    return [
        (
            torch.randn(count, inputs, dtype=torch.float64, generator=g) * (1 + position),
            torch.randint(0, classes, (count,), generator=g),
        )
        for position, count in enumerate(rows)
    ]


def whole(batches):
    """All rows of all batches as one (inputs, targets) pair."""
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


class ConvNet(nn.Module):
    """Convolution, batch norm, pooling: buffers and a mode that matters."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        features = torch.tanh(self.norm(self.convolution(images)))
        return self.head(self.dropout(features.mean((2, 3))))


def conv_net(seed=0, dropout=0.0):
    """A ConvNet whose running statistics are those of some images, in evaluation mode."""
    torch.manual_seed(seed)
    model = ConvNet(dropout).double()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 1, 6, 6, dtype=torch.float64) * 2 + 1)
    return model.eval()


def images(rows, seed=1):
    g = generator(seed)
    return [
        (torch.randn(count, 1, 6, 6, dtype=torch.float64, generator=g), torch.randint(0, 3, (count,), generator=g))
        for count in rows
    ]


def causal_lm(architecture, seed=0, dtype=torch.float64):
    """One of transformers' causal language models from a config, about a thousand parameters."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    modern = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(seed)
    match architecture:
        case "llama" | "llama-tied":
            tied = architecture == "llama-tied"
            config = t.LlamaConfig(**common, **modern, num_key_value_heads=1, tie_word_embeddings=tied)
            model = t.LlamaForCausalLM(config)
        case "gpt2":
            config = t.GPT2Config(**common, n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=16)
            model = t.GPT2LMHeadModel(config)
        case "qwen3":
            config = t.Qwen3Config(**common, **modern, num_key_value_heads=1, head_dim=4)
            model = t.Qwen3ForCausalLM(config)
        case "gpt-neox":
            config = t.GPTNeoXConfig(**common, **modern)
            model = t.GPTNeoXForCausalLM(config)
        case "opt":
            shape = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 12, "max_position_embeddings": 16}
            config = t.OPTConfig(**common, **shape, num_hidden_layers=2, num_attention_heads=2)
            model = t.OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual .02 would leave a Hessian of nearly nothing
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def token_batches(lengths=((8, 5, 3), (7,)), *, seed=1):
    """Right-padded batches; `lengths` gives the number of tokens of each row of each batch."""
    g = generator(seed)
    out = []
    for rows in lengths:
        width = max(*rows, 2)
        ids = torch.randint(2, VOCABULARY, (len(rows), width), generator=g)
        mask = (torch.arange(width) < torch.tensor(rows)[:, None]).long()
        ids = torch.where(mask.bool(), ids, 1)
        out.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)})
    return out


def language_loss(model, batches):
    """Mean over all counted tokens of all batches of the next-token cross-entropy, from the logits, in float64."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = torch.logsumexp(logits, -1) - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total = total + losses[labels != -100].sum()
        count += int((labels != -100).sum())
    return total / count
