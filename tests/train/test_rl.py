"""Reinforcement learning: the loss by hand, who is asked what, and whole runs."""

import math
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from runs import assert_every_row_once, assert_same_weights, steps

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.tasks.rewarded import TaskOptions, load_task
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.train import policy_gradient, rl
from nanochat_ray.train.checkpoint import load_model, resolve_checkpoint
from nanochat_ray.train.metrics import read_metrics
from nanochat_ray.train.policy_gradient import Answer
from nanochat_ray.train.rl import Asker, Policy, Question, RlOptions


def processes(name: str) -> list[psutil.Process]:
    """Of this process's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def task(name: str = "Vowels"):
    return load_task(TaskOptions(task=f"{Path(__file__).with_name('vowels.py')}:{name}"))


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(64, 96, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# The first two share their prompt. The second has three tokens of a tool's output, the last is one token long.
ANSWERS = [
    Answer([1, 2, 20, 21], [3, 4, 5], [1, 1, 1], [-2.0, -3.0, -4.0], "", 1.0, False),
    Answer([1, 2, 20, 21], [7, 8, 9, 10, 11, 12], [1, 0, 0, 0, 1, 1], [-1.0, 0, 0, 0, -4.0, -5.0], "", 0.0, False),
    Answer([5], [6], [1], [-9.0], "", 0.5, False),
]
ADVANTAGES = [0.5, -0.75, 0.25]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("window", [2, 64])
def test_gradients_are_those_of_a_loop_over_tokens_in_fp64(model, window, stale):
    for block in model.transformer.h:
        block.attn.window = window
    params = SamplingParams(temperature=1.0, top_k=10)
    loss, sums, _ = policy_gradient.policy_loss(model, ANSWERS, ADVANTAGES, params, stale)
    loss.backward()
    ours = {name: p.grad.double() for name, p in model.named_parameters()}
    model.zero_grad()

    model.double()
    expected, cut, count = 0.0, 0, 0
    for answer, advantage in zip(ANSWERS, ADVANTAGES, strict=True):
        for at in range(len(answer.ids)):
            if not answer.drawn[at]:
                continue
            hidden = model.hidden(torch.tensor([answer.prompt + answer.ids[:at]]))[0, -1]
            logits = 15 * torch.tanh(model.lm_head(hidden)[:96] / 15)
            token = answer.ids[at]
            weight = 1.0
            if stale:
                with torch.no_grad():
                    likeliest = logits.topk(10)
                    now = -math.inf
                    if token in likeliest.indices.tolist():
                        now = (logits[token] - likeliest.values.logsumexp(0)).item()
                    ratio = math.exp(now - answer.logprobs[at])
                    weight, cut = min(ratio, 2.0), cut + (ratio > 2)
            expected = expected - advantage * weight * logits.log_softmax(-1)[token]
            count += 1
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6 * largest, msg=name)
    assert sums[0] == count == 7 and sums[1] == 5 + 10 and sums[4] == cut  # two prompts and three answers were read


def test_advantages_are_over_the_mean_of_the_question():
    groups = [[replace(ANSWERS[0], reward=r) for r in rewards] for rewards in ([1, 0, 0, 1], [1, 1, 1, 1])]
    assert policy_gradient.advantages_of(groups, by_std=False) == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert policy_gradient.advantages_of(groups, by_std=True) == pytest.approx([1, -1, -1, 1, 0, 0, 0, 0], abs=1e-5)


def test_micro_batches_have_each_answer_once_within_their_tokens():
    answers = [replace(ANSWERS[2], ids=[0] * length) for length in (2, 59, 6, 7, 30, 29, 4)]
    batches = list(policy_gradient.micro_batches([(answer, float(i)) for i, answer in enumerate(answers)], 62))
    assert sorted(i for _, advantages in batches for i in advantages) == [0, 1, 2, 3, 4, 5, 6]
    assert [len(of) * max(map(len, of)) <= 62 for of, _ in batches] == [True] * len(batches)
    assert len(batches) == 3


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_question_is_asked_once_an_epoch_whatever_the_ranks(ranks):
    given = task()
    policy, asked, seeds = Policy(given, RlOptions("", prompts_per_step=7)), [], set()
    for step in range(6):
        for rank in range(ranks):
            for question in policy.questions(7 * step, step, rank, ranks):
                asked.append(question.conversation["messages"][0]["content"])
                seeds.add(question.seed)
    every = sorted(c["messages"][0]["content"] for c in given.train)
    assert sorted(asked[:21]) == sorted(asked[21:]) == every and asked[:21] != asked[21:]
    assert len(seeds) == 42  # a question has other answers in the next epoch
    whole = [q.conversation["messages"][0]["content"] for q in Policy(given, policy.o).questions(7, 1)]
    assert whole == asked[7:14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_actors_weights_answer_as_the_trainers(model, dtype):
    model.set_compute_dtype(dtype)
    copy = GPT(model.config).set_compute_dtype(dtype)
    for p in copy.parameters():
        p.data = p.data.to(dtype)
    weights = rl.flatten(model)
    weights.flags.writeable = False  # as Ray's are
    rl.unflatten(weights, copy)
    params = SamplingParams(8, n=3, for_training=True)
    prompts = [[1, 2, 3], [4, 5]]
    assert Engine(copy).generate(prompts, params) == Engine(model).generate(prompts, params)


def test_a_reward_that_fails_is_named_with_its_answer(golden):
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    asker = Asker(task("Broken"), RlOptions("", max_new_tokens=3), tokenizer, torch.device("cpu"))
    asker.take_weights(model)
    with pytest.raises(ValueError, match=r"the task's reward fails on '.*': ZeroDivisionError: division by zero"):
        asker.ask([Question(asker.task.train[0], 1)], 2)
    model.lm_head.weight.data[:] = torch.nan
    asker.take_weights(model)
    with pytest.raises(ValueError, match="the model's output is not a number"):
        asker.ask([Question(asker.task.train[0], 1)], 2)


def test_what_can_not_be_is_one_line():
    for options, why in (
        (RlOptions("", num_samples=1), "compared to others"),
        (RlOptions("", staleness=1), "--rollout-workers"),
        (RlOptions("", staleness=2), "0 or 1"),
        (RlOptions("", prompts_per_step=0), "prompts_per_step 0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=why):
            rl.check(options, task())
    with pytest.raises(ValueError, match="no questions"):
        rl.check(RlOptions(""), SimpleNamespace(train=[], val=[]))


def test_all_rates_are_a_twentieth_of_the_base_rates(model):
    base, ours = (build_optimizer(model, **lrs, weight_decay=0.0) for lrs in (BASE_LRS, rl.learning_rates(1.0, 1.0)))
    for of_base, group in zip(base.param_groups, ours.param_groups, strict=True):
        assert group["lr"] == pytest.approx(of_base["lr"] / 20), group["param_names"]
    kept = build_optimizer(model, **rl.learning_rates(3.0, 0), weight_decay=0.0).param_groups
    assert {group["kind"]: group["lr"] for group in kept} == {"adamw": 0, "muon": pytest.approx(3 / 20 * 0.02)}


@pytest.fixture(scope="module")
def options(uninterrupted):
    """Of a run of some seconds, but for starting its workers."""
    return RlOptions(
        uninterrupted.checkpoint,
        steps=12,
        prompts_per_step=4,
        num_samples=8,
        max_new_tokens=8,
        lr_factor=10,
        eval_every=0,
        eval_questions=8,
        eval_samples=4,
        save_every=4,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The result of a run with two actors to which nothing happened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        return rl.run(replace(options, rollout_workers=2, run="whole"), task())


@pytest.mark.slow
def test_reward_rises_and_all_is_logged(whole):
    lines = steps(whole.run_dir)
    rewards = [line["rl/reward"] for line in lines]
    assert sum(rewards[-4:]) > 1.1 * sum(rewards[:4])
    assert_every_row_once(whole.run_dir, 12, 4)
    assert all(abs(line["rl/mismatch_kl"]) < 1e-4 and line["rl/mismatch_max"] < 1e-3 for line in lines)
    assert all(line["rl/staleness"] == 0 and 0 < line["rl/entropy"] < math.log(4096) for line in lines)
    assert [line["step"] for line in read_metrics(whole.run_dir) if "pass@4" in line] == [0, 12]
    assert lines[0]["train/lrm"] == 1 and lines[-1]["train/lrm"] == pytest.approx(1 / 12)


@pytest.mark.slow
def test_killed_actors_and_a_killed_trainer_leave_the_end_as_it_was(options, whole, nanochat_ray_home):
    """Each actor is killed once, then the trainer. Questions are asked again: none is lost or used twice."""
    run_dir, killed = nanochat_ray_home / "runs" / "killed", set()

    def kill():
        patience = time.monotonic() + 120
        while time.monotonic() < patience:
            time.sleep(0.02)
            at = max((line["step"] for line in steps(run_dir)), default=0)
            if at and len(killed) < 2:
                found = [p for p in processes("RolloutActor") if p.pid not in killed]
            elif at >= 6:
                found = processes("RayTrainWorker")
            else:
                continue
            for process in found:
                process.kill()
                killed.add(process.pid)
            if len(killed) > 2:
                return

    thread = threading.Thread(target=kill)
    thread.start()
    rl.run(replace(options, rollout_workers=2, run="killed"), task())
    thread.join()
    assert len(killed) == 3
    assert_same_weights(run_dir, whole.run_dir)
    assert_every_row_once(run_dir, 12, 4)


@pytest.mark.slow
def test_answers_a_step_old_are_corrected(options, nanochat_ray_home):
    result = rl.run(replace(options, rollout_workers=1, staleness=1, adamw_factor=0, run="stale"), task())
    lines = steps(result.run_dir)
    assert [line["rl/staleness"] for line in lines] == [0, *[1] * 11]
    assert_every_row_once(result.run_dir, 12, 4)
    assert max(line["rl/mismatch_max"] for line in lines[1:]) > 1e-3 > lines[0]["rl/mismatch_max"]
    before, after = (
        load_model(resolve_checkpoint(folder))[0].state_dict() for folder in (options.checkpoint, result.checkpoint)
    )
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("transformer.h.") for name in changed)  # the matrices alone


@pytest.mark.slow
def test_two_workers_share_the_questions_that_they_ask_themselves(options, whole, nanochat_ray_home):
    result = rl.run(replace(options, workers=2, steps=3, run="two"), task())
    theirs = steps(whole.run_dir)
    for line, other in zip(steps(result.run_dir), theirs[:3], strict=True):
        assert line["train/world_size"] == 2
        assert line["rl/reward"] == pytest.approx(other["rl/reward"], abs=0.02)
    assert steps(result.run_dir)[0]["rl/reward"] == pytest.approx(theirs[0]["rl/reward"], abs=1e-9)
