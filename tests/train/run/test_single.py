"""A whole job on one device: it learns, and how a step is cut up does not matter."""

from __future__ import annotations

import pytest
import torch
import transformers

from mxn.errors import ConfigError, UserError
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data import DataSettings, Rows, prepare
from mxn.train.run.lora import LoraSettings
from mxn.train.run.optim import AdamSettings
from mxn.train.run.schedule import Schedule, learning_rate
from mxn.train.run.single import RunSettings, SingleTrainer
from mxn.train.run.weights import ModelSource
from support.training import LLAMA, SHAKESPEARE

SCHEDULE = Schedule(peak=3e-3, num_steps=6, warmup_steps=2)
SEQ = 48


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "play.txt").write_text(SHAKESPEARE.read_text()[:30_000])
    settings = DataSettings(paths=(folder / "play.txt",), documents="paragraph")
    return prepare(settings, Tokenizer.load(LLAMA), 1024, home=folder / "home")


def make(cache, *, micro_batch=2, micro_batches=2, begin="scratch", run=None, **options):
    source = ModelSource.open(LLAMA, seq_tokens=SEQ, begin=begin, seed=4)
    rows = Rows(cache, seq_tokens=SEQ, micro_batch=micro_batch, seed=1)
    settings = RunSettings(schedule=SCHEDULE, micro_batches=micro_batches, **(run or {}))
    return SingleTrainer(source, rows, settings, **options)


def curve(trainer) -> list[float]:
    return [log.loss for log in trainer.run()]


def test_a_job_learns_and_reports_its_steps(cache):
    seen = []
    logs = make(cache).run(on_step=seen.append)
    assert seen == logs
    assert [log.step for log in logs] == list(range(6))
    assert [log.learning_rate for log in logs] == [learning_rate(SCHEDULE, s) for s in range(6)]
    assert logs[-1].loss < logs[0].loss - 0.5
    assert all(0 < log.num_tokens <= 4 * SEQ and log.seconds > 0 for log in logs)


def test_the_curve_does_not_depend_on_how_a_step_is_accumulated(cache):
    want = curve(make(cache, micro_batch=4, micro_batches=1))
    for micro_batch, micro_batches in ((1, 4), (2, 2)):
        got = curve(make(cache, micro_batch=micro_batch, micro_batches=micro_batches))
        assert got == pytest.approx(want, abs=2e-5)


def test_recomputation_does_not_change_the_curve(cache):
    want = curve(make(cache))
    assert curve(make(cache, recompute="full")) == pytest.approx(want, abs=1e-6)


def test_the_curve_is_the_one_of_transformers(cache):
    trainer = make(cache, begin="checkpoint", run={"clip_norm": 0.5})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        LLAMA, dtype=torch.float32, attn_implementation="sdpa"
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for log in trainer.run():
        batches = [trainer.rows.micro_batch(2 * log.step + m) for m in (0, 1)]
        num_tokens = sum(batch.num_tokens for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            same = batch.segments[:, :, None] == batch.segments[:, None]
            mask = (same & torch.ones(SEQ, SEQ).tril().bool()).unsqueeze(1)
            logits = model(batch.ids, attention_mask=mask, position_ids=batch.positions).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
            )
            (loss / num_tokens).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = log.learning_rate
        optimizer.step()
        assert log.loss == pytest.approx(total / num_tokens, abs=2e-5)
        assert log.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        assert log.num_tokens == num_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(cache, dtype):
    want = curve(make(cache))
    assert curve(make(cache, dtype=dtype)) == pytest.approx(want, abs=0.02)


def test_lora_learns_a_little(cache):
    run = {"lora": LoraSettings(rank=4), "adam": AdamSettings(weight_decay=0.0)}
    trainer = make(cache, begin="checkpoint", run=run)
    before = trainer.evaluate(trainer.rows, range(12))
    trainer.run()
    assert trainer.evaluate(trainer.rows, range(12)) < before


def test_a_loss_that_is_no_number_stops_the_job_before_the_update(cache):
    trainer = make(cache)
    trainer.run(1)
    with torch.no_grad():
        trainer.stage.embedding.weight[:] = float("inf")
    before = trainer.stage.layer_state(1)["model.layers.0.mlp.down_proj.weight"].clone()
    with pytest.raises(UserError, match="norm of the gradients is nan"):
        trainer.train_step()
    after = trainer.stage.layer_state(1)["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(before, after)
    assert trainer.step == 1


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="micro-batch"):
        RunSettings(schedule=SCHEDULE, micro_batches=0)
    with pytest.raises(ConfigError, match="clip_norm"):
        RunSettings(schedule=SCHEDULE, micro_batches=1, clip_norm=0.0)
