"""The cost model against XLA's own counts, against what can be counted by hand, and against train
steps compiled for eight simulated devices, for which this file is run as a program."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import compiled  # noqa: F401
import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jax_ddpm import factory
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.recipe import one_network
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.arithmetic import activation_bytes, array_bytes, flops
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.cost import (
    COMPILER_OPTIONS,
    Collective,
    Machine,
    collective_seconds,
    compiled_volumes,
    gradient_work,
    predict,
    step_cost,
)
from jax_ddpm.training.layout import fsdp_spec
from jax_ddpm.training.state import init_state

ROWS = 1  # of one device, in one micro-batch: activations are small beside the network
# devices that share the state, micro-batches
LAYOUTS = {"data": (1, 1), "fsdp": (8, 1), "both": (4, 2)}
# XLA's CPU backend computes all it can as early as it can by default, whatever memory it takes.
SPARING = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def dense(params, x, time, conditioning, dropout_keys=None):
    """A network that compiles at once: arrays that can be split and one too small for it.

    All are needed for the backward pass, unlike a layer that nothing is trained before.
    """
    h = (x + params["bias"]).reshape(len(x), -1)
    for block in params["blocks"]:
        h += jnp.sin(h @ block["in"] + time[:, None]) @ block["out"]
    return h.reshape(x.shape)


def setting(network="dense", remat="", accumulate=1):
    config = tiny.config(
        model__base_channels=32, model__channel_multipliers=(1,), model__remat=remat
    )
    model = factory.Model(config, tiny.spec())
    (phase,) = make_recipe(config, model).phases
    objective = phase.objective
    params = model.network.init(jax.random.key(0)) if network == "unet" else {}
    if network == "dense":
        blocks = [{"in": jnp.zeros((16, 512)), "out": jnp.zeros((512, 16))} for _ in range(4)]
        params = {"bias": jnp.zeros((1, 4, 4, 1)), "blocks": blocks}
        objective = dataclasses.replace(objective, apply=dense)
    recipe = one_network(config, model.network, model.codec, objective)._replace(
        accumulate=accumulate
    )
    state = partial(init_state, recipe)
    return recipe, jax.eval_shape(state, {"network": params})


def batch(*shape):
    return {"image": jax.ShapeDtypeStruct((*shape, 4, 4, 1), jnp.uint8)}


def compare(network, layout):
    """The work of one device in a train step over all of them: as predicted, and as compiled."""
    fsdp, accumulate = LAYOUTS[layout]
    mesh = make_mesh(fsdp)
    recipe, state = setting(network, accumulate=accumulate)
    cost = step_cost(recipe, state, gradient_work(recipe, state, batch(ROWS)), mesh)

    def laid_out(leaf):
        sharding = NamedSharding(mesh, fsdp_spec(leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(laid_out, state)
    examples = batch(1, ROWS * accumulate * mesh.size)
    seed = jax.eval_shape(lambda: jax.random.key(0))
    step = compile_step(recipe, state, mesh)
    lowered = step.program.lower(state, step.held, examples, seed)
    program = lowered.compile(COMPILER_OPTIONS | SPARING)
    memory = program.memory_analysis()
    return {
        "predicted": [[*each, volume] for each, volume in cost.volumes.items()],
        "compiled": [[*each, n] for each, n in compiled_volumes(program.as_text()).items()],
        "state_bytes": cost.state_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "network_bytes": sum(map(array_bytes, jax.tree.leaves(state.params))),
        "checkpoint_bytes": cost.checkpoint_bytes,
    }


@pytest.fixture(scope="module", params=["dense", pytest.param("unet", marks=pytest.mark.slow)])
def compared(request):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        # Less work on machine code; collectives, arithmetic and memory stay what they are.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, __file__, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_carry_the_bytes_that_are_predicted(compared, layout):
    """Scalars come on top, while biases that have the same gradient are summed once for both, and
    what no backward pass needs, as the first layer of the time, is not gathered again."""
    predicted, found = (
        {tuple(each): volume for *each, volume in compared[layout][name]}
        for name in ("predicted", "compiled")
    )
    for each in predicted.keys() | found.keys():
        tolerance = 2e-2 if each[0] == "all-gather" else 2e-3
        volume = predicted.get(each, 0)
        assert found.get(each, 0) == pytest.approx(volume, rel=tolerance, abs=1000), each


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_takes_the_bytes_that_are_predicted(compared, layout):
    """The images, the counters and the key come on top."""
    found = compared[layout]
    assert 0 <= found["argument_bytes"] - found["state_bytes"] < 1000
    assert found["checkpoint_bytes"] == compared["data"]["state_bytes"]


def test_devices_that_share_the_state_never_hold_the_whole_network(compared):
    """Beside the state: parameters are not kept for the backward pass, gradients are scattered.

    Where every device has the state, it holds the whole gradient.
    """
    whole, shared = (compared[layout] for layout in ("data", "fsdp"))
    assert shared["temp_bytes"] < shared["network_bytes"] < whole["temp_bytes"]


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


CONVOLUTIONS = {
    "plain": dict(window_strides=(1, 1), padding="VALID"),
    "padded": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 2), padding="SAME"),
    "dilated": dict(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 1)),
    "transposed": dict(window_strides=(1, 1), padding=((1, 2), (2, 1)), lhs_dilation=(2, 3)),
    "grouped": dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
}


def convolution(name):
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC")) | CONVOLUTIONS[name]
    inputs = 4 // options.get("feature_group_count", 1)
    arguments = abstract(2, 7, 8, 4), abstract(3, 3, inputs, 6)
    return partial(jax.lax.conv_general_dilated, **options), arguments


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_costs_what_xla_counts(name):
    function, arguments = convolution(name)
    assert (
        flops(function, *arguments) == jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_gradient_of_a_convolution_costs_what_it_does(name):
    function, arguments = convolution(name)

    def gradients(cotangent, *arguments):
        return jax.vjp(function, *arguments)[1](cotangent)

    once = flops(function, *arguments)
    assert flops(gradients, jax.eval_shape(function, *arguments), *arguments) == 3 * once


def test_a_matrix_product_costs_a_multiply_add_for_each_pair():
    function = partial(jnp.einsum, "bqc,bkc->bqk")
    assert flops(function, abstract(2, 3, 5), abstract(2, 7, 5)) == 2 * (2 * 3 * 7 * 5)


def test_what_runs_several_times_counts_as_often():
    def function(x, w):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.matmul)(x, w), None), x, length=5)[0]

    x, w = abstract(2, 3), abstract(3, 3)
    assert flops(jax.jit(function), x, w) == 5 * 2 * (2 * 3 * 3)


def test_of_a_choice_the_dearest_counts():
    def function(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    assert flops(function, abstract(2, 3), abstract(3, 3)) == 2 * (2 * 3 * 3)


def test_what_is_split_over_devices_costs_the_same_in_all():
    mesh = make_mesh()
    spec = PartitionSpec("data")
    mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    arguments = abstract(8, 3), abstract(3, 3)
    assert flops(mapped, *arguments) == flops(jnp.matmul, *arguments)


def test_activations_are_what_the_derivative_needs():
    def function(w, x):
        return jnp.sin(x @ w).sum()

    arguments = abstract(3, 5), abstract(2, 3)
    assert activation_bytes(function, *arguments) == 4 * 2 * 5  # the cosine
    assert activation_bytes(jax.checkpoint(function), *arguments) == 0


def test_rematerialisation_computes_more_to_keep_less():
    works = [
        gradient_work(*setting("unet", remat), batch(ROWS))
        for remat in ("", "elementwise", "blocks")
    ]
    kept = [work.activation_bytes for work in works]
    assert kept[0] > kept[1] > kept[2] > 0
    everything, elementwise, blocks = (work.flops for work in works)
    # One of three products is computed again in the blocks, which are not quite all.
    assert everything == elementwise < blocks < 4 / 3 * everything


MODULE = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %part = bf16[2,3]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[2,4], to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %sums = (f32[10], f32[]) all-reduce(%a, %b), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %more = f32[10]{0} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %rest = f32[10]{0} all-reduce(%a), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}
  %last = f32[10] all-reduce(%a), replica_groups=mesh['f'=4,'d'=2], device_ids=([2,4]T(1,0)) {'d'}
  %all = f32[4,4]{1,0} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %none = f32[4]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_collectives_are_read_from_a_module():
    assert compiled_volumes(MODULE) == {
        Collective("reduce-scatter", 4): 5 * 4 * (2 * 3 * 2),
        Collective("all-reduce", 2, stride=4): 44 + 40 + 40 + 40,
        Collective("all-gather", 4): 64,
    }


def test_collectives_in_a_loop_of_unknown_length_are_refused():
    text = MODULE.replace("known_trip_count", "unknown")
    with pytest.raises(ValueError, match="unknown length"):
        compiled_volumes(text)


MACHINE = Machine(
    flops=1e12,
    memory=1e9,
    memory_bandwidth=1e10,
    domain=4,
    link=1e9,
    outer_link=1e8,
    latency=1e-3,
    outer_latency=1e-2,
    flops_share=1.0,
    bandwidth_share=1.0,
)


def test_within_a_domain_a_collective_takes_what_each_device_sends():
    for each in (Collective("all-reduce", 4), Collective("all-gather", 2)):
        seconds = collective_seconds(each, 8_000_000, MACHINE)
        assert seconds == pytest.approx(each.sent(8_000_000) / 1e9 + each.passes * 1e-3)


def test_beyond_a_domain_only_the_part_of_each_device_passes():
    seconds = collective_seconds(Collective("reduce-scatter", 8), 8_000_000, MACHINE)
    assert seconds == pytest.approx(6e6 / 1e9 + 1e-3 + 1e6 / 1e8 + 1e-2)
    # Devices so far apart that each domain has one of them.
    seconds = collective_seconds(Collective("reduce-scatter", 2, stride=4), 8_000_000, MACHINE)
    assert seconds == pytest.approx(4e6 / 1e8 + 1e-2)


def test_a_step_takes_as_long_as_its_parts():
    recipe, state = setting()
    cost = step_cost(recipe, state, gradient_work(recipe, state, batch(ROWS)), make_mesh())
    prediction = predict(cost, MACHINE._replace(flops=1e6))
    assert prediction.bound == "arithmetic"
    assert prediction.parts["arithmetic"] == pytest.approx(cost.work.flops / 1e6)
    assert prediction.parts["update"] == pytest.approx(cost.update_bytes / 1e10)
    assert prediction.seconds == pytest.approx(sum(prediction.parts.values()))
    slow_links = predict(cost, MACHINE._replace(link=1.0))
    assert slow_links.bound == "collectives"


def test_a_shared_state_is_updated_in_shares():
    recipe, state = setting()
    work = gradient_work(recipe, state, batch(ROWS))
    whole, shared = (step_cost(recipe, state, work, make_mesh(fsdp)) for fsdp in (1, 4))
    assert shared.checkpoint_bytes == whole.checkpoint_bytes == whole.state_bytes
    assert whole.state_bytes / 4 < shared.state_bytes < whole.state_bytes / 2
    assert shared.update_bytes / whole.update_bytes == pytest.approx(
        shared.state_bytes / whole.state_bytes, rel=1e-2
    )


if __name__ == "__main__":
    print(json.dumps({layout: compare(sys.argv[1], layout) for layout in LAYOUTS}))
