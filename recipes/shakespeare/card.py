"""The model card: what was measured, by which rule, with which command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SHAPES = {
    "llama": ("Llama", "grouped-query attention, SwiGLU, tied embeddings"),
    "dsv3": ("DeepSeek-V3", "latent attention (MLA), sigmoid `noaux_tc` routing over groups"),
}

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small language model in {family} shape ({detail}) that ships with mxn, so that `mxn up` has a
real model to serve on any machine. It writes in the manner of Shakespeare's plays; it knows
nothing else.

| | |
|---|---|
| parameters | {parameters} ({active} used for a token) |
| weights | {weight_bytes} bytes, bfloat16 |
| vocabulary | {vocab_size} byte-level BPE tokens; any UTF-8 text is kept exactly |
| context | {context} tokens |
| training text | the first 87 % of `recipes/data/tinyshakespeare.txt` (public domain) |

## Held-out perplexity

The last tenth of the file (the end of *The Taming of the Shrew* and *The Tempest*),
{heldout_tokens} tokens, {heldout_bytes} bytes, never seen in training. Bits per byte do not
depend on the tokenizer.

| model | perplexity per token | bits per byte |
|---|---:|---:|
{score_rows}

Rule: windows of {context} tokens that overlap by half, a token is scored once with at least half
a window before it, the first token of the text is not scored, no start token. The checkpoint's
bfloat16 weights, computed in float32 by `transformers`. The baselines are trained on the same
tokens of the same training text (`recipes/baselines.py`). The 3 % of the file between the two
pieces chose the step at which the weights were best. The figures are also in `training.json`.

## A continuation of held-out text

The prompt is a passage that the model has never seen; temperature 0.8, top-p 0.95, seed 1.

```text
{prompt}
```

goes on as

```text
{continuation}
```

## Two ways to use it

- **Continue text** (`/v1/completions`, `mxn run`). In plain text a blank line ends a speech and the
  next speaker follows. The model goes on from speaker to speaker and stops at `max_tokens`, or at a
  stop string such as a blank line.
- **Chat** (`/v1/chat/completions`, `mxn chat`). The template turns messages into speeches: you are
  JULIET, the model is ROMEO, a system message is spoken by the Chorus. `name` of a message chooses
  another speaker, and the template variable `speaker` another part for the model:
  `{{"chat_template_kwargs": {{"speaker": "PETRUCHIO"}}}}`.

How both work at once: a part of the training rows ({dialogue_percent} %) is dialogue, where
`<|bos|>` opens and every speech ends with `<|eos|>` instead of the blank line, exactly as the chat
template writes it; the other rows are the plain file, where no special token occurs. After a chat
template the model therefore ends its speech with `<|eos|>`, which stops generation; in plain text
it hardly ever does (a test holds the mean probability of `<|eos|>` there below 1 in 1,000 tokens;
`ignore_eos` rules it out). No start token is added to plain text.

## Training

```sh
{command}
```

{steps} steps of {batch_tokens} tokens ({epochs} passes over the text), best validation at step
{best_step}. {minutes} minutes on {threads} thread(s) of {cpu}, of which the run had the CPU for
{cpu_minutes}. {check}

Not reproducible to the bit between machines (matrix products differ), but the data order and the
seed are fixed. Licence of the weights: Apache-2.0, like mxn; the text is in the public domain.
"""


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write README.md from the facts of training.json."""
    family, detail = _SHAPES[facts["shape"]]
    rows = [
        f"| {name} | {score['perplexity_per_token']} | {score['bits_per_byte']} |"
        for name, score in facts["heldout"].items()
    ]
    settings = facts["settings"]
    text = _CARD.format(
        name=folder.name,
        family=family,
        detail=detail,
        score_rows="\n".join(rows),
        parameters=f"{facts['parameters']:,}",
        active=f"{facts['active_parameters']:,}",
        weight_bytes=f"{facts['weight_bytes']:,}",
        heldout_tokens=f"{facts['heldout_tokens']:,}",
        heldout_bytes=f"{facts['heldout_bytes']:,}",
        prompt=facts["sample"]["prompt"],
        continuation=facts["sample"]["continuation"],
        dialogue_percent=round(100 * settings["dialogue_share"]),
        minutes=round(facts["training_seconds"] / 60, 1),
        cpu_minutes=round(facts["training_cpu_seconds"] / 60, 1),
        check=f"Against `transformers` in float32 the largest relative error of the logits is "
        f"{facts['export_relative_error']:.1e}.",
        steps=settings["steps"] + settings["long_steps"],
        batch_tokens=settings["batch_tokens"],
        **{
            key: facts[key]
            for key in ("vocab_size", "context", "command", "epochs", "best_step", "threads", "cpu")
        },
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
