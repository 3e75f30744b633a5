"""What several ranks do together: the steps of one, in an order that hides what they send."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_ray.model import shards
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.model.shards import Matrices, make_shards

D24 = GPTConfig(2048, 32768, 24, 12, 12, 1536)
CONFIG = GPTConfig(32, 256, 4, 2, 2, 64, "SL")
ROWS, STEPS = 6, 4


@pytest.mark.parametrize("world_size", [8, 16, 32])
def test_hardly_anything_that_is_sent_is_padding(world_size):
    with torch.device("meta"):
        pieces = make_shards(groups(GPT(D24)), 0, world_size, torch.bfloat16)
    sent = sum(shard.length * world_size for shard in pieces if not shard.replicated)
    assert sent <= 1.001 * sum(p.numel() for shard in pieces for p in shard.params.values())


@pytest.mark.parametrize("world_size", [1, 2, 7, 8, 16, 32, 64])
def test_every_parameter_has_one_owner(world_size):
    with torch.device("meta"):
        model = GPT(D24)
    owned = [make_shards(groups(model), rank, world_size, torch.bfloat16) for rank in range(world_size)]
    elements = sum(view.numel() for rank in owned for shard in rank if not shard.replicated for view in shard.owned())
    elements += sum(p.numel() for shard in owned[0] if shard.replicated for p in shard.params.values())
    assert elements == sum(p.numel() for p in model.parameters())
    layers = [shard.layer for shard in owned[0]]
    assert layers[0] == math.inf and layers == sorted(layers, reverse=True)  # the order of a backward
    if 1 < world_size <= 16:
        assert sum(isinstance(shard, Matrices) for shard in owned[0]) >= 4


def groups(model):
    return build_optimizer(model, **BASE_LRS, weight_decay=0.1).param_groups


def build(dtype):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    for block in model.transformer.h:  # or most gradients of the first step are zero
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.05)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.05)
    model.set_compute_dtype(dtype)
    optimizer = build_optimizer(model, **BASE_LRS, weight_decay=0.1)
    optimizer.overlap(model)
    return model, optimizer


def train(model, optimizer, steps, rank=0, world_size=1, micro_batches=2):
    """Like the training loop: rows shared out, their loss as a part of the whole batch's."""
    for step in steps:
        batch = torch.randint(CONFIG.vocab_size, (ROWS, 33), generator=torch.Generator().manual_seed(step))
        parts = batch.tensor_split(world_size)[rank].tensor_split(micro_batches)
        for i, part in enumerate(parts):
            loss = model(part[:, :-1], part[:, 1:], loss_reduction="sum") * world_size / (ROWS * 32)
            if i == len(parts) - 1:
                optimizer.reduce_in_backward()
            loss.backward()
        optimizer.step()


def held_out_loss(model):
    batch = torch.randint(CONFIG.vocab_size, (ROWS, 33), generator=torch.Generator().manual_seed(STEPS))
    with torch.no_grad():
        return model(batch[:, :-1], batch[:, 1:]).item()


def run_rank(rank, world_size, folder, dtype):
    """Train, and keep what the other end of the test compares."""
    torch.set_num_threads(1)
    shards.MIN_BUCKET_BYTES = 2**16  # several, for a model so small
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    model, optimizer = build(dtype)
    assert sum(isinstance(shard, Matrices) for shard in optimizer.shards) >= 2
    events = record_events(model, optimizer)
    train(model, optimizer, range(STEPS), rank, world_size)
    loss = held_out_loss(model)
    read = {name: p.detach().to(dtype).clone() for name, p in model.named_parameters()}
    optimizer.gather_exactly()
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = {"loss": loss, "read": read, "exact": exact, "state": optimizer.shard_state(), "events": events}
    torch.save(result, f"{folder}/{rank}")
    dist.destroy_process_group()


def record_events(model, optimizer):
    """The order of gradients and collectives, from here on."""
    events = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(("gradient", name)))
    for name in ("all_to_all_single", "all_gather_into_tensor", "all_reduce"):
        call = getattr(dist, name)

        def recorded(tensor, *args, call=call, name=name, **options):
            events.append((name, tensor.numel()))
            return call(tensor, *args, **options)

        setattr(dist, name, recorded)
    for shard in optimizer.shards:
        finish = shard.finish_gather

        def arrived(finish=finish, layer=shard.layer):
            events.append(("arrived", layer))
            finish()

        shard.finish_gather = arrived
    for layer, block in enumerate(model.transformer.h):
        block.register_forward_pre_hook(lambda *_, layer=layer: events.append(("forward", layer)))
    return events


@pytest.fixture(scope="module", params=[(2, torch.float32), (3, torch.bfloat16)], ids=["2 ranks", "3 ranks in bf16"])
def ranks(request, tmp_path_factory):
    world_size, dtype = request.param
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (world_size, folder, dtype), nprocs=world_size)
    return dtype, [torch.load(folder / str(rank)) for rank in range(world_size)]


def test_several_ranks_take_the_steps_of_one(ranks):
    dtype, results = ranks
    model, optimizer = build(dtype)
    train(model, optimizer, range(STEPS), micro_batches=2 * len(results))
    assert held_out_loss(model) == pytest.approx(results[0]["loss"], abs=1e-4 if dtype == torch.float32 else 1e-2)
    if dtype == torch.float32:
        for name, p in model.named_parameters():
            assert (p.detach() - results[0]["exact"][name]).abs().mean() < 1e-5, name


def test_all_ranks_read_the_same_weights(ranks):
    """Also where the owner alone has them in fp32, until they are gathered for a checkpoint."""
    _, results = ranks
    for other in results[1:]:
        for name, weight in results[0]["read"].items():
            assert torch.equal(weight, other["read"][name]), name
            assert torch.equal(results[0]["exact"][name], other["exact"][name]), name
            assert torch.equal(weight, results[0]["exact"][name].to(weight.dtype)), name


def test_gradients_are_sent_while_the_backward_runs(ranks):
    for result in ranks[1]:
        events = [name for name, _ in result["events"]]
        last_backward = len(events) - events[::-1].index("gradient")
        reduces = [i for i, name in enumerate(events) if name == "all_to_all_single"]
        first = len(reduces) // STEPS * (STEPS - 1)  # of the last step
        during = sum(i < last_backward for i in reduces[first:])
        assert during >= len(reduces[first:]) - 2  # the gradients of the first layers come last


def test_all_ranks_send_the_same_in_the_same_order(ranks):
    sent = [[event for event in result["events"] if event[0].startswith("all_")] for result in ranks[1]]
    assert all(other == sent[0] for other in sent[1:])


def test_the_forward_waits_for_no_more_than_it_reads(ranks):
    layers = CONFIG.n_layer
    for result in ranks[1]:
        events = [event for event in result["events"] if event[0] in ("arrived", "forward")]
        last_forward = len(events) - events[::-1].index(("forward", layers - 1))
        running, arrived = layers - 1, 0
        for name, layer in events[:last_forward]:
            if name == "forward":
                running = layer
            else:
                assert running == (layers - 1 if layer in (0, math.inf) else layer - 1)
                arrived += 1
        assert arrived > STEPS * layers


def test_the_state_of_one_number_of_ranks_is_that_of_another(ranks):
    """One rank goes on with the weights and the state of all."""
    dtype, results = ranks
    state = {}
    for result in results:
        for key, (row, value) in result["state"].items():
            state.setdefault(key, []).append((row, value))
    whole = {key: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])]) for key, parts in state.items()}
    model, optimizer = build(dtype)
    model.load_state_dict(results[0]["exact"], strict=False)
    optimizer.load_shard_state(lambda key, start, stop: whole[key][start:stop])
    own = optimizer.shard_state()
    assert own.keys() == whole.keys() and all(torch.equal(own[key][1], whole[key]) for key in own)
