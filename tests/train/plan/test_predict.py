"""What a whole plan is predicted to do, by hand where a hand can."""

import itertools
import math
from dataclasses import replace

import pytest

from mxn.errors import UserError
from mxn.train.plan.closed import pipeline_time
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.predict import Tuning, predict
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape
from mxn.train.plan.simulate import simulate_plan
from mxn.train.plan.totals import weakest

NO_COST = Link(latency_s=0.0, bytes_per_s=1e30, basis="measured")
SLOW = Link(latency_s=0.0, bytes_per_s=1e6, basis="measured")
BLOCKS = 6


def layer(kind, params=1000, flop=2000.0):
    return LayerShape(
        kind=kind, params=params, forward_flop=flop, activation_bytes=50.0, output_bytes=10.0
    )


SHAPE = ModelShape(
    name="toy",
    layers=(layer("embedding", flop=0.0), *([layer("block")] * BLOCKS), layer("head")),
    seq_tokens=100,
)


def profile(chip, slow=1.0, basis="measured"):
    seconds = {"embedding": 0.0, "block": 1.0 * slow, "head": 0.5 * slow}
    return ChipProfile(
        chip=chip,
        costs={
            (kind, 1, 1): LayerCost(forward_s=s, backward_s=2 * s, optimizer_s=0.01)
            for kind, s in seconds.items()
        },
        basis=basis,
    )


def group(name, *, link=NO_COST, num=8, **more):
    return DeviceGroup(
        name=name,
        chip=name,
        num_devices=num,
        devices_per_node=4,
        memory_bytes=10**6,
        node_link=link,
        group_link=link,
        **more,
    )


def pipeline(ends, groups, count, first=0):
    starts = [0, *ends[:-1]]
    seen = itertools.count(first)
    return Pipeline(
        stages=tuple(
            Stage(group=name, first_device=next(seen), chunks=(Chunk(first=a, end=b),))
            for a, b, name in zip(starts, ends, groups, strict=True)
        ),
        micro_batches=count,
    )


def plan(*pipelines, **more):
    return TrainPlan(
        model="toy",
        num_layers=SHAPE.num_layers,
        seq_tokens=100,
        micro_batch=1,
        pipelines=pipelines,
        **more,
    )


PROFILES = {"fast": profile("fast"), "slow": profile("slow", 2.0)}


def test_one_device_takes_its_layers_times_its_micro_batches():
    found = predict(
        plan(pipeline([8], ["fast"], 5)), SHAPE, Cluster(groups=(group("fast"),)), PROFILES
    )
    assert found.pipeline_s == pytest.approx(5 * (BLOCKS * 3 + 1.5))
    assert found.reduce_s == 0
    assert found.bubble == pytest.approx(0)
    assert found.optimizer_s == pytest.approx(8 * 0.01)
    assert found.tokens_per_s == pytest.approx(500 / found.iteration_s)


def test_pipelines_of_unequal_speed_wait_for_the_slower_one_with_its_own_share():
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): NO_COST})
    fair = plan(pipeline([8], ["fast"], 8), pipeline([8], ["slow"], 4))
    found = predict(fair, SHAPE, both, PROFILES)
    assert found.pipeline_s == pytest.approx(8 * 19.5)
    assert found.bubble == pytest.approx(0)
    uneven = plan(pipeline([8], ["fast"], 6), pipeline([8], ["slow"], 6))
    assert predict(uneven, SHAPE, both, PROFILES).pipeline_s == pytest.approx(6 * 39)


def test_the_sum_of_gradients_goes_over_the_slowest_link():
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): SLOW})
    found = predict(
        plan(pipeline([8], ["fast"], 2), pipeline([8], ["slow"], 1)), SHAPE, both, PROFILES
    )
    assert found.reduce_s == pytest.approx(8 * 1000 * 2 / 1e6)


def test_layers_cut_differently_are_summed_run_by_run():
    one = Cluster(groups=(group("fast", link=SLOW),))
    found = predict(
        plan(pipeline([3, 8], ["fast"] * 2, 2), pipeline([5, 8], ["fast"] * 2, 2, first=2)),
        SHAPE,
        one,
        PROFILES,
    )
    sums = [stage.reduce_s for stage in found.stages]
    # Layers 0-2 are between the first stages, 3-4 between second and first, 5-7 between second.
    assert sums == pytest.approx([0.006, 0.010, 0.010, 0.006])


def wide(chip, tps):
    one = profile(chip)
    costs = {(kind, 1, tp): cost for (kind, _, _), cost in one.costs.items() for tp in tps}
    return replace(one, costs=costs)


def test_layers_held_at_different_widths_are_summed_whole_in_memory_of_their_own():
    """As the runner does; at one width each device sums its part, where it lies."""
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): SLOW})
    profiles = {name: wide(name, (2, 4)) for name in ("fast", "slow")}
    memory = MemoryModel(reduce_bytes=4, trainable_share=0.5)

    def found(tps, seen):
        stages = [replace(pipeline([8], [name], 1).stages[0], tp=tp) for name, tp in tps.items()]
        made = plan(*(Pipeline(stages=(stage,), micro_batches=1) for stage in stages))
        told = seen(made, SHAPE, both, profiles, memory=memory)
        told = told if seen is predict else told.prediction
        return told.reduce_s, [stage.memory_bytes for stage in told.stages]

    for seen in (predict, simulate_plan):
        even_s, even = found({"fast": 4, "slow": 4}, seen)
        uneven_s, uneven = found({"fast": 4, "slow": 2}, seen)
        assert even_s == pytest.approx(8 * 1000 / 4 * 2 / 1e6)
        assert uneven_s == pytest.approx(8 * 1000 * 2 / 1e6)
        assert uneven[0] == pytest.approx(even[0] + 8 * 1000 * 2)
        assert uneven[1] == pytest.approx(2 * even[1] + 8 * 1000 * 2)


def test_later_stages_hide_their_sums_behind_the_drain():
    one = Cluster(groups=(group("fast", link=Link(latency_s=0, bytes_per_s=1e3)),))
    pair = plan(pipeline([1, 8], ["fast"] * 2, 4), pipeline([1, 8], ["fast"] * 2, 4, first=2))
    found = predict(pair, SHAPE, one, PROFILES)
    # The first stage holds one layer of eight; the second stage ends a backward earlier.
    last = next(s for s in found.stages if s.stage == 1)
    assert found.reduce_s < last.reduce_s


def test_alike_pipelines_are_timed_once():
    calls = []

    def timer(*args, **more):
        calls.append(args)
        return pipeline_time(*args, **more)

    one = Cluster(groups=(group("fast", num=64),))
    many = plan(*(pipeline([4, 8], ["fast"] * 2, 3, first=2 * p) for p in range(32)))
    predict(many, SHAPE, one, PROFILES, timer=timer)
    assert len(calls) == 1


def test_pipelines_over_a_node_border_are_timed_apart():
    calls = []

    def timer(*args, **more):
        calls.append(args)
        return pipeline_time(*args, **more)

    far = replace(group("fast"), group_link=SLOW)
    inside = pipeline([4, 8], ["fast"] * 2, 3)
    across = Pipeline(
        stages=(
            replace(inside.stages[0], first_device=3),
            replace(inside.stages[1], first_device=4),
        ),
        micro_batches=3,
    )
    predict(plan(inside, across), SHAPE, Cluster(groups=(far,)), PROFILES, timer=timer)
    assert len(calls) == 2


def test_full_recomputation_pays_a_forward_and_keeps_less():
    one = Cluster(groups=(group("fast"),))
    plain = plan(pipeline([8], ["fast"], 1))
    stage = replace(plain.pipelines[0].stages[0], recompute="full")
    again = replace(plain, pipelines=(Pipeline(stages=(stage,), micro_batches=1),))
    a, b = (predict(p, SHAPE, one, PROFILES) for p in (plain, again))
    # Six of the eight layers are blocks of a second forward, and those alone are computed again.
    assert b.pipeline_s == pytest.approx(a.pipeline_s + 6)
    assert b.stages[0].memory_bytes < a.stages[0].memory_bytes


def test_what_comes_from_a_chip_of_wider_values_takes_more():
    """One micro-batch in flight and six messages of 1,000 bytes, which are 2,000 there."""
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): NO_COST})
    cut = plan(pipeline([4, 8], ["fast", "slow"], 1))
    memory = MemoryModel(inputs_kept=1, messages=6)
    wider = PROFILES | {"fast": replace(PROFILES["fast"], width=2.0)}
    plain, found = (
        predict(cut, SHAPE, both, profiles, memory=memory).stages[1].memory_bytes
        for profiles in (PROFILES, wider)
    )
    assert found == pytest.approx(plain + 7 * 1000)


def test_memory_decides_whether_a_plan_fits():
    one = Cluster(groups=(group("fast"),))
    whole = plan(pipeline([8], ["fast"], 1))
    found = predict(whole, SHAPE, one, PROFILES)
    assert found.stages[0].memory_bytes == pytest.approx(8 * (1000 * 16 + 50 * 100))
    assert found.fits
    small = Cluster(groups=(replace(group("fast"), memory_bytes=1000),))
    assert not predict(whole, SHAPE, small, PROFILES).fits


def test_sharing_the_optimizer_out_divides_its_time_and_state():
    one = Cluster(groups=(group("fast"),))
    pair = plan(pipeline([8], ["fast"], 1), pipeline([8], ["fast"], 1, first=1))
    a, b = (predict(p, SHAPE, one, PROFILES) for p in (pair, replace(pair, shards_optimizer=True)))
    assert b.optimizer_s == pytest.approx(a.optimizer_s / 2)
    assert a.stages[0].memory_bytes - b.stages[0].memory_bytes == pytest.approx(8 * 1000 * 6)


def test_a_tied_matrix_is_exchanged_between_first_and_last_stage():
    one = Cluster(groups=(group("fast", link=SLOW),))
    cut = plan(pipeline([4, 8], ["fast"] * 2, 1))
    tied = replace(SHAPE, is_tied=True)
    found = predict(cut, tied, one, PROFILES, memory=MemoryModel(reduce_bytes=4))
    assert found.reduce_s == pytest.approx(1000 * 4 / 1e6)
    assert predict(plan(pipeline([8], ["fast"], 1)), tied, one, PROFILES).reduce_s == 0


HALVES = replace(SLOW, float32_share=0.5)  # as between islands with wire_dtype: bfloat16


@pytest.mark.parametrize(("is_float32", "factor"), [(True, 0.5), (False, 1.0)])
def test_only_float32_activations_are_narrowed_on_the_wire(is_float32, factor):
    """16 bit goes as it is; it was predicted at half its time."""
    wide = replace(SHAPE, layers=tuple(replace(one, output_bytes=1e4) for one in SHAPE.layers))
    cut = plan(pipeline([4, 8], ["fast", "slow"], 1))
    known = {name: replace(one, is_float32=is_float32) for name, one in PROFILES.items()}
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): HALVES})
    free = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): NO_COST})
    for seconds in (predict, lambda *case: simulate_plan(*case).prediction):
        hops_s = (
            seconds(cut, wide, both, known).pipeline_s - seconds(cut, wide, free, known).pipeline_s
        )
        assert hops_s == pytest.approx(2 * 1e4 * 100 / 1e6 * factor)


def test_gradients_are_narrowed_on_the_wire_and_new_weights_are_not():
    model = MemoryModel(reduce_bytes=4, shares_layers=True)
    pair = plan(pipeline([8], ["fast"], 2), pipeline([8], ["slow"], 1))
    whole_s = 8 * 1000 * 4 / 1e6
    for shards, expected_s in ((False, whole_s / 2), (True, whole_s / 2 + whole_s)):
        both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): HALVES})
        case = (replace(pair, shards_optimizer=shards), SHAPE, both, PROFILES)
        assert predict(*case, memory=model).reduce_s == pytest.approx(expected_s)
        assert simulate_plan(*case, memory=model).prediction.reduce_s == pytest.approx(expected_s)


def overlapping(params, *, head_params=None, is_tied=False):
    """Layers of so many parameters, and a chip that sums their gradients beside its work."""
    layers = [replace(one, params=params) for one in SHAPE.layers]
    if head_params is not None:
        layers[0] = replace(layers[0], params=head_params)
        layers[-1] = replace(layers[-1], params=head_params)
    shape = replace(SHAPE, layers=tuple(layers), is_tied=is_tied)
    return shape, {"fast": replace(PROFILES["fast"], overlaps_sums=True)}


def pair_case(shape, profiles, sum_s, schedule="1f1b"):
    """Two like pipelines of a stage, whose gradients (four bytes each) take `sum_s` to sum."""
    link = Link(latency_s=0.0, bytes_per_s=shape.params * 4 / sum_s)
    whole = plan(pipeline([8], ["fast"], 2), pipeline([8], ["fast"], 2, first=1), schedule=schedule)
    return whole, shape, Cluster(groups=(group("fast", link=link, num=2),)), profiles


FLOAT_SUMS = MemoryModel(reduce_bytes=4)


def both_ways(case):
    found = [seen(*case, memory=FLOAT_SUMS) for seen in (predict, simulate_plan)]
    return found[0].reduce_s, found[1].prediction.reduce_s


@pytest.mark.parametrize(
    ("sum_s", "left_s"),
    [
        (8.0, 2.0),  # hidden but for embedding and first block, an eighth each: ready at the end
        (24.0, 24.0 - 13.0 + 1.0),  # longer than the 13 s backward, behind 1 s for the head
    ],
)
def test_gradient_sums_run_beside_the_last_backward_pass_of_an_accelerator(sum_s, left_s):
    """They were predicted behind it, up to a whole pass too late."""
    shape, profiles = overlapping(5_000_000)  # 20 MB: each layer is a bucket
    for reduce_s in both_ways(pair_case(shape, profiles, sum_s)):
        assert reduce_s == pytest.approx(left_s)
    on_host = {"fast": PROFILES["fast"]}
    for reduce_s in both_ways(pair_case(shape, on_host, sum_s)):
        assert reduce_s == pytest.approx(sum_s)


def test_gradients_of_one_bucket_and_of_a_split_backward_wait_for_its_end():
    small, profiles = overlapping(1000)
    for reduce_s in both_ways(pair_case(small, profiles, 3.0)):
        assert reduce_s == pytest.approx(3.0)
    large, _ = overlapping(5_000_000)
    for reduce_s in both_ways(pair_case(large, profiles, 3.0, schedule="zero-bubble")):
        assert reduce_s == pytest.approx(3.0)


def test_a_tied_matrix_is_summed_when_all_is_done():
    """The matrix is as large as all six blocks, and the first of those is ready at the end too."""
    shape, profiles = overlapping(5_000_000, head_params=30_000_000, is_tied=True)
    for reduce_s in both_ways(pair_case(shape, profiles, 8.0)):
        assert reduce_s == pytest.approx(8.0 * 7 / 12)


def test_stages_cut_differently_start_each_sum_when_its_layers_are_done():
    """A sum of the last layers is under way while the same stage goes back through the others."""
    shape, profiles = overlapping(5_000_000)
    cut = plan(pipeline([3, 8], ["fast"] * 2, 2), pipeline([5, 8], ["fast"] * 2, 2, first=2))
    link = Link(latency_s=0.0, bytes_per_s=5e6 * 4 / 0.5)  # half a second for a layer
    one = Cluster(groups=(group("fast", link=link),))
    early, late = (
        predict(cut, shape, one, known, memory=FLOAT_SUMS) for known in (profiles, PROFILES)
    )
    assert early.pipeline_s == late.pipeline_s
    assert late.reduce_s == pytest.approx(3 * 0.5)
    assert early.reduce_s == pytest.approx(2 * 0.5)  # embedding and the first block
    drawn = simulate_plan(cut, shape, one, profiles, memory=FLOAT_SUMS)
    for spans in drawn.sums.values():
        assert all(start <= end for start, end in spans)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))


def test_a_sum_waits_for_the_member_that_cannot_start_early():
    shape, profiles = overlapping(5_000_000)
    host = replace(PROFILES["fast"], chip="slow")  # as quick
    link = Link(latency_s=0.0, bytes_per_s=shape.params * 4 / 8.0)
    both = Cluster(groups=(group("fast"), group("slow")), links={("fast", "slow"): link})
    mixed = plan(pipeline([8], ["fast"], 2), pipeline([8], ["slow"], 2))
    found = predict(mixed, shape, both, profiles | {"slow": host}, memory=FLOAT_SUMS)
    assert found.reduce_s == pytest.approx(8.0)


def test_energy_and_money_are_of_the_devices_of_the_plan():
    paid = group("fast", watts=300.0, price_micro_per_hour=3_600_000, peak_flop_per_s=1e6)
    found = predict(
        plan(pipeline([4, 8], ["fast"] * 2, 2)), SHAPE, Cluster(groups=(paid,)), PROFILES
    )
    assert found.energy_j == pytest.approx(2 * 300 * found.iteration_s)
    assert found.cost_micro == pytest.approx(2 * 1000 * found.iteration_s)
    work = 3 * 7 * 2000.0 * 200
    assert found.mfu == pytest.approx(work / (found.iteration_s * 2e6))


def test_what_is_unknown_stays_unknown():
    found = predict(
        plan(pipeline([8], ["fast"], 1)), SHAPE, Cluster(groups=(group("fast"),)), PROFILES
    )
    assert (found.energy_j, found.cost_micro, found.mfu) == (None, None, None)


def test_the_basis_is_the_weakest_of_what_was_used():
    assert weakest(["measured", "derived"]) == "derived"
    assert weakest(["simulated", "measured"]) == "simulated"
    with pytest.raises(UserError, match="basis"):
        weakest(["guessed"])
    both = Cluster(
        groups=(group("fast"), group("slow")),
        links={("fast", "slow"): Link(latency_s=0, bytes_per_s=1e9, basis="assumed")},
    )
    alone = predict(plan(pipeline([8], ["fast"], 1)), SHAPE, both, PROFILES)
    assert alone.basis == "measured"
    mixed = plan(pipeline([4, 8], ["fast", "slow"], 1))
    assert predict(mixed, SHAPE, both, PROFILES).basis == "assumed"


def test_a_flow_that_is_slower_than_the_link_holds_both_ends():
    one = Cluster(groups=(group("fast"),))
    cut = plan(pipeline([4, 8], ["fast"] * 2, 10))
    free = predict(cut, SHAPE, one, PROFILES).pipeline_s
    held = predict(cut, SHAPE, one, PROFILES, tuning=Tuning(flow_bytes_per_s=1000.0)).pipeline_s
    assert held == pytest.approx(free + (10 - 1) * 2 * 1.0 + 4 * 1.0)


def test_a_plan_for_another_model_is_refused():
    one = Cluster(groups=(group("fast"),))
    short = replace(SHAPE, layers=SHAPE.layers[:-1])
    with pytest.raises(UserError, match="7"):
        predict(plan(pipeline([8], ["fast"], 1)), short, one, PROFILES)
    with pytest.raises(UserError, match="100"):
        predict(plan(pipeline([8], ["fast"], 1)), replace(SHAPE, seq_tokens=64), one, PROFILES)


def test_a_chip_or_layer_without_profile_is_named():
    one = Cluster(groups=(group("fast"),))
    whole = plan(pipeline([8], ["fast"], 1))
    with pytest.raises(UserError, match="fast"):
        predict(whole, SHAPE, one, {})
    with pytest.raises(UserError, match="micro-batch 2"):
        predict(replace(whole, micro_batch=2), SHAPE, one, PROFILES)


def moe_case(expert_parallel, link=NO_COST):
    """Two pipelines of one device over a model whose blocks have experts."""
    expert = replace(
        layer("block.moe", params=9000), active_params=1000, routed_to=2, output_bytes=10.0
    )
    shape = replace(SHAPE, layers=(SHAPE.layers[0], *([expert] * BLOCKS), SHAPE.layers[-1]))
    costs = {
        (kind.replace("block", "block.moe"), mbs, tp): cost
        for (kind, mbs, tp), cost in PROFILES["fast"].costs.items()
    }
    profiles = {"fast": replace(PROFILES["fast"], costs=costs)}
    pair = plan(
        pipeline([8], ["fast"], 3),
        pipeline([8], ["fast"], 3, first=1),
        expert_parallel=expert_parallel,
    )
    return pair, shape, Cluster(groups=(group("fast", link=link),)), profiles


def test_shared_out_experts_take_less_memory_and_a_shorter_update():
    alone, shared = (predict(*moe_case(count)) for count in (1, 2))
    dense = 2 * 1000
    assert alone.stages[0].memory_bytes - shared.stages[0].memory_bytes == pytest.approx(
        BLOCKS * (9000 - 1000) / 2 * 16
    )
    assert shared.optimizer_s < alone.optimizer_s
    assert dense * 16 < shared.stages[0].memory_bytes


def test_tokens_travel_to_their_experts_and_back_in_both_passes():
    link = Link(latency_s=0.0, bytes_per_s=1e4)
    shared = predict(*moe_case(2, link))
    alone = predict(*moe_case(1, link))
    # There and back, forward and backward, half of the tokens to two experts each.
    each = 2 * 2 * (10.0 * 2 * 100 * 0.5) / 1e4
    assert shared.pipeline_s - alone.pipeline_s == pytest.approx(3 * BLOCKS * each)


def test_the_simulator_sees_the_same_exchange():
    case = moe_case(2, Link(latency_s=0.0, bytes_per_s=1e4))
    simulated = simulate_plan(*case).prediction
    assert simulated.pipeline_s == pytest.approx(predict(*case).pipeline_s)


def test_experts_are_shared_only_by_pipelines_that_are_cut_alike():
    pair, shape, cluster, profiles = moe_case(2)
    other = replace(pair, pipelines=(pair.pipelines[0], pipeline([4, 8], ["fast"] * 2, 3, first=1)))
    with pytest.raises(UserError, match="cut the model differently"):
        predict(other, shape, cluster, profiles)
    with pytest.raises(UserError, match="groups of 3"):
        predict(replace(pair, expert_parallel=3), shape, cluster, profiles)


# -- what is no plan, and what is no time ------------------------------------------------------


WHOLE = plan(pipeline([8], ["fast"], 1))


def with_stage(**changes):
    stage = replace(WHOLE.pipelines[0].stages[0], **changes)
    return replace(WHOLE, pipelines=(Pipeline(stages=(stage,), micro_batches=1),))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (replace(WHOLE, pipelines=()), "at least one pipeline"),
        (replace(WHOLE, pipelines=(Pipeline(stages=(), micro_batches=1),)), "no stage"),
        (replace(WHOLE, schedule="2f2b"), "unknown schedule '2f2b'"),
        (replace(WHOLE, micro_batch=0), "micro-batches of 0 rows"),
        (replace(WHOLE, expert_parallel=0), "expert_parallel 0"),
        (with_stage(recompute="some"), "unknown recomputation 'some'"),
        (with_stage(tp=0), "a stage of 0 devices"),
        (with_stage(first_device=-1), "from -1 of group"),
        (with_stage(first_device=8), "uses device 8 of group 'fast', which has 8"),
        (with_stage(chunks=(Chunk(first=0, end=4), Chunk(first=4, end=8))), "1f1b has one"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_not_predicted(broken, words):
    with pytest.raises(UserError, match=words):
        predict(broken, SHAPE, Cluster(groups=(group("fast"),)), PROFILES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"micro_batches": 1', '"micro_batches": "1"'),
        ('"micro_batches": 1', '"micro_batches": 0'),
        ('"first_device": 0', '"first_device": 0.5'),
        ('"schedule": "1f1b"', '"schedule": "any"'),
        ('"end": 8', '"end": 7'),
    ],
)
def test_a_plan_file_with_a_wrong_value_is_refused(old, new):
    text = WHOLE.to_json()
    assert TrainPlan.from_json(text) == WHOLE
    assert old in text
    with pytest.raises(UserError):
        TrainPlan.from_json(text.replace(old, new))


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_that_is_none_makes_no_profile(seconds):
    with pytest.raises(UserError, match="negative or none"):
        LayerCost(forward_s=seconds, backward_s=1.0, optimizer_s=0.0)


def test_a_step_without_time_is_no_prediction():
    nothing = LayerCost(forward_s=0.0, backward_s=0.0, optimizer_s=0.0)
    idle = replace(PROFILES["fast"], costs=dict.fromkeys(PROFILES["fast"].costs, nothing))
    with pytest.raises(UserError, match="no prediction"):
        predict(WHOLE, SHAPE, Cluster(groups=(group("fast"),)), {"fast": idle})


@pytest.mark.parametrize(("rate", "latency"), [(0.0, 0.0), (-1.0, 0.0), (1e9, -1.0), (math.nan, 0)])
def test_a_link_that_cannot_be_is_refused(rate, latency):
    with pytest.raises(UserError, match="a link of"):
        Link(latency_s=latency, bytes_per_s=rate)


def test_a_tied_matrix_counts_once_where_one_stage_holds_embedding_and_head():
    tied = replace(SHAPE, is_tied=True)
    one = Cluster(groups=(group("fast", link=SLOW),))
    model = MemoryModel(weight_bytes=1, grad_bytes=0, optimizer_bytes=0, reduce_bytes=1)

    def found(shape, *pipelines):
        return predict(plan(*pipelines), shape, one, PROFILES, memory=model)

    whole = pipeline([8], ["fast"], 1)
    twice, once = found(SHAPE, whole), found(tied, whole)
    assert twice.stages[0].memory_bytes - once.stages[0].memory_bytes == SHAPE.layers[0].params
    assert twice.optimizer_s - once.optimizer_s == pytest.approx(0.01)
    # Sums of gradients too.
    pair = whole, pipeline([8], ["fast"], 1, first=1)
    share = tied.params / sum(layer.params for layer in tied.layers)
    assert found(tied, *pair).reduce_s == pytest.approx(found(SHAPE, *pair).reduce_s * share)
    # On two stages there are two copies.
    cut = pipeline([4, 8], ["fast"] * 2, 1)
    assert [s.memory_bytes for s in found(tied, cut).stages] == [
        s.memory_bytes for s in found(SHAPE, cut).stages
    ]
