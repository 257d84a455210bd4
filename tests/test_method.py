"""The rollout, its gradient, the teacher and the draws: what D-OPSD is."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train_dopsd_lora as script


@pytest.fixture
def visited(student, monkeypatch):
    """The latents that the student sees; the teacher is told by its context."""
    states, velocity = [], student.pipeline.velocity

    def recorded(transformer, latents, timestep, contexts):
        if contexts[0] is not recorded.teacher:
            states.append(latents.clone())
        return velocity(transformer, latents, timestep, contexts)

    monkeypatch.setattr(student.pipeline, "velocity", recorded)
    recorded.teacher, recorded.states = None, states
    return recorded


@pytest.mark.families()
@pytest.mark.parametrize("trained", ["all", "last"])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("steps", [4, 8])
def test_rollout_is_the_stock_pipelines_trajectory(family, student, stock, visited, steps, size, trained):
    """Trained on other states than inference visits, the LoRA would not be on-policy."""
    height, width = size
    prompt = "a red square"
    noise, _, teacher_contexts = student.batch(1, height, width)
    expected = [family.gives(student.pipeline, noise)]
    stock(
        prompt=prompt, height=height, width=width, num_inference_steps=steps, guidance_scale=family.guidance_scale,
        latents=family.takes(student.pipeline, noise.clone()), output_type="latent",
        callback_on_step_end=lambda pipe, step, time, values: expected.append(values["latents"].clone()) or {},
    )  # fmt: skip

    visited.teacher = teacher_contexts[0]
    drawn = [list(range(steps))] if trained == "all" else [[steps - 1]]
    student.backward((noise, student.pipeline.encode_student([prompt]), teacher_contexts), steps, drawn=drawn)
    assert len(visited.states) == steps and torch.equal(visited.states[0], noise)
    for ours, theirs in zip(visited.states, expected):
        torch.testing.assert_close(family.gives(student.pipeline, ours), theirs, rtol=0, atol=1e-5)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(expected, expected[1:]))


@pytest.mark.families()
def test_rollout_steps_as_the_scheduler_does(student, visited):
    """Bit for bit, so that the equation in the docstring is what inference computes."""
    latents, contexts, teacher_contexts = batch = student.batch(2)
    visited.teacher = teacher_contexts[0]
    student.backward(batch)
    ours = visited.states.copy()
    for k, timestep in enumerate(student.pipeline.few_step_grid(4, latents)):
        assert torch.equal(ours[k], latents)
        velocity = student.pipeline.velocity(student.transformer, latents, timestep, contexts).detach()
        latents = student.pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def reference(student, batch, steps, weighting):
    """Losses and gradient of one backward through all K graphs; the teacher is a second set of weights, copied in."""
    pipeline, (latents, student_contexts, teacher_contexts) = student.pipeline, batch
    timesteps = pipeline.few_step_grid(steps, latents)
    own = [p.detach().clone() for p in student.parameters]
    losses = []
    for k, t in enumerate(timesteps):
        velocity = pipeline.velocity(student.transformer, latents, t, student_contexts)
        with torch.no_grad():
            # a copy of the transformer: weights that autograd has saved must not be written to
            for parameter, shadow in zip(student.parameters, student.teacher.shadow):
                parameter.data = shadow.clone()
            target = pipeline.velocity(student.transformer, latents, t, teacher_contexts)
            for parameter, weights in zip(student.parameters, own):
                parameter.data = weights
        sigma = t / 1000
        losses.append((sigma**2 if weighting == "x0" else 1.0) * (velocity - target).pow(2).mean())
        after = timesteps[k + 1] / 1000 if k + 1 < steps else 0.0
        latents = latents + (after - sigma) * velocity.detach()
    for parameter in student.parameters:
        parameter.grad = None
    torch.stack(losses).mean().backward()
    return torch.stack(losses).detach(), [p.grad.clone() for p in student.parameters]


@pytest.mark.families()
@pytest.mark.parametrize("weighting", ["velocity", "x0"])
def test_gradient_is_that_of_one_backward_through_all_states(student, weighting):
    """A backward per state must not change what is optimised, nor may the teacher's weights leak into it."""
    batch = student.batch(2)
    expected_losses, expected = reference(student, batch, 4, weighting)
    losses, gradient = student.backward(batch, loss_weighting=weighting)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert any(g.abs().max() > 1e-4 for g in expected)
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.families()
def test_gradient_checkpointing_gives_the_same_gradient(student):
    """Recomputed activations must come from the student's weights, although the teacher's were in place in between."""
    calls = []
    script.repeated_blocks(student.transformer)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = student.batch(2)
    losses, expected = student.backward(batch)
    plain = len(calls)
    student.transformer.enable_gradient_checkpointing()
    checkpointed_losses, gradient = student.backward(batch)
    assert plain == 2 * 4 and len(calls) - plain == 3 * 4  # each block of the student runs once more
    assert torch.equal(losses, checkpointed_losses)
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.families()
def test_student_learns_and_teacher_and_base_do_not(student):
    """A gradient that reaches the base or the teacher's shadow trains something that is not saved."""
    shadows = [s.clone() for s in student.teacher.shadow]
    weights = [p.detach().clone() for p in student.parameters]
    _, gradient = student.backward(student.batch(2))
    assert all(g.abs().max() > 0 for g in gradient)
    for shadow, before in zip(student.teacher.shadow, shadows):
        assert torch.equal(shadow, before) and shadow.grad is None and not shadow.requires_grad
    for parameter, before in zip(student.parameters, weights):
        assert torch.equal(parameter, before) and parameter.requires_grad
    frozen = [p for n, p in student.transformer.named_parameters() if "lora_" not in n]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ("steps", "drawn", "trained", "passed"),
    [(3, [[0, 1, 2]], 3, 0), (4, [[0]], 1, 0), (4, [[2]], 1, 2), (4, [[1, 3]], 2, 2), (4, [[3], [0]], 1, 3), (8, [[7]], 1, 7)],
)  # fmt: skip
def test_no_forward_is_done_in_vain(student, steps, drawn, trained, passed):
    """A trained state costs a forward of student and teacher, one before it a forward of the student alone, one after
    it none."""
    grads = []
    student.transformer.register_forward_pre_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    student.backward(student.batch(len(drawn)), steps, drawn=drawn)
    assert Counter(grads) == {True: trained, False: trained + passed}


def test_teacher_uses_ema_weights_and_the_teachers_context(student):
    """A teacher with the student's weights is the live copy that the paper shows to collapse."""
    noise, contexts, teacher_contexts = student.batch(1)
    losses, _ = student.backward((noise, contexts, teacher_contexts))
    student.teacher.shadow[0].add_(0.5)
    moved, _ = student.backward((noise, contexts, teacher_contexts))
    assert (moved - losses).abs().min() > 1e-6
    other, _ = student.backward(
        (noise, contexts, [{"prompt_embeds": c["prompt_embeds"] + 1} for c in teacher_contexts])
    )
    assert (other - moved).abs().min() > 1e-6
    # student = teacher in weights and context: nothing to learn
    for shadow, parameter in zip(student.teacher.shadow, student.parameters):
        shadow.copy_(parameter.detach())
    same, _ = student.backward((noise, contexts, contexts))
    assert same.abs().max() < 1e-10


def test_teacher_weights_are_put_back_after_an_error(student, monkeypatch):
    """An interrupted run that saves would save the teacher as the student."""
    weights = [p.detach().clone() for p in student.parameters]
    monkeypatch.setattr(student.pipeline, "velocity", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student.backward(student.batch(1))
    assert all(torch.equal(p, w) for p, w in zip(student.parameters, weights))


def test_x0_weighting_is_sigma_squared(student):
    """--loss_weighting x0 is the loss that the authors' code trains with, at every state."""
    batch = student.batch(1)
    velocity, _ = student.backward(batch, loss_weighting="velocity")
    x0, _ = student.backward(batch, loss_weighting="x0")
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5])  # shift 3 of 1, 3/4, 1/2, 1/4
    torch.testing.assert_close(x0, sigmas**2 * velocity)


def test_accumulated_gradient_is_the_mean_of_micro_steps(student):
    """Otherwise --gradient_accumulation_steps would change the learning rate."""
    batch = student.batch(1)
    losses, whole = student.backward(batch)
    same_losses, half = student.backward(batch, gradient_accumulation_steps=2)
    assert torch.equal(losses, same_losses)
    for a, b in zip(whole, half):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.families()
@pytest.mark.parametrize("weighting", ["velocity", "x0"])
@pytest.mark.parametrize("drawn", [[[0, 1, 2, 3]] * 2, [[0, 2], [1, 3]], [[3], [1]]])
def test_batch_of_two_equals_two_of_one(student, drawn, weighting):
    """Prompts of different lengths in a batch must not see each other's padding, nor images each other's time, weight
    or states."""
    noise, contexts, teacher_contexts = batch = student.batch(2)
    first, second = (len(c["prompt_embeds"]) for c in contexts)
    assert first == second or first <= 32 < second  # padded by the family itself, or to 32 and 64 tokens
    losses, gradient = student.backward(batch, drawn=drawn, loss_weighting=weighting)
    singles = [
        student.backward(
            (noise[i : i + 1], contexts[i : i + 1], teacher_contexts[i : i + 1]), drawn=[drawn[i]], loss_weighting=weighting
        )
        for i in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(
        losses, torch.stack([s for s, _ in singles]).nanmean(0), rtol=1e-4, atol=0, equal_nan=True
    )
    for both, first, second in zip(gradient, singles[0][1], singles[1][1]):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weighting", ["velocity", "x0"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mean_gradient_over_the_draws_is_that_of_all_states(student, flags, tmp_path, count, weighting):
    """A draw or a weight that is off would train another loss than the paper's, and nobody would see it."""
    batch, means = student.batch(1), 0.0
    args = script.parse_args(flags(tmp_path, rollout_steps=4, states_per_rollout=count))
    _, expected = student.backward(batch, loss_weighting=weighting)
    for micro_step in range(4):
        drawn = script.draw_states(args, [micro_step])
        _, gradient = student.backward(batch, drawn=drawn, loss_weighting=weighting)
        means = [mean + g / 4 for mean, g in zip(means or [0.0] * len(gradient), gradient)]
    for ours, theirs in zip(means, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def peak_bytes(work, folder):
    """Peak of the memory that torch allocates on the CPU during `work`, above what is allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    trace.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    return np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]).max()


def test_memory_does_not_grow_with_the_number_of_states(student, tmp_path):
    """With all K graphs kept, 8 states would not fit where 2 do."""
    batch = student.batch(2)
    student.backward(batch)  # what is allocated once
    one = peak_bytes(lambda: student.backward(batch, rollout_steps=2, drawn=[[0], [1]]), tmp_path)
    two = peak_bytes(lambda: student.backward(batch, rollout_steps=2), tmp_path)
    eight = peak_bytes(lambda: student.backward(batch, rollout_steps=8), tmp_path)
    assert two > 2**20  # the activations of a forward are in it
    assert one < 1.05 * two and eight < 1.05 * two


def ema_after(decay, steps, dtype=torch.float32):
    """Shadow after `steps` steps of a weight that starts at 1 and stands at 2 afterwards."""
    parameter = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    shadow = [parameter.detach().clone()]
    parameter.data.fill_(2.0)
    for _ in range(steps):
        script.update_ema(shadow, [parameter], decay)
    return shadow[0]


def test_ema_decay_is_constant_from_the_first_step():
    """With the usual warm-up of an EMA the teacher would follow the student for thousands of steps."""
    for steps in (1, 2, 50):
        torch.testing.assert_close(ema_after(0.9999, steps), torch.full((8,), 2 - 0.9999**steps), rtol=0, atol=2e-6)
    torch.testing.assert_close(ema_after(0.5, 3), torch.full((8,), 2 - 0.125))


def test_ema_extremes_are_the_frozen_base_and_the_live_copy():
    """--ema_decay 1.0 and 0.0 are the two controls of the paper."""
    assert torch.equal(ema_after(1.0, 50), torch.ones(8))
    assert torch.equal(ema_after(0.0, 1), torch.full((8,), 2.0))


# -------------------------------------------------------------------------------------------------------------- draws
BUCKETS = ((32, 32),) * 5 + ((24, 40),) * 3


def drawing(batch_size, seed, prior_prompts="none"):
    return SimpleNamespace(train_batch_size=batch_size, seed=seed, prior_prompts=prior_prompts, prior_every=3)


def rows_of(draws):
    return [row for row, _ in draws]


def numbers_of(draws):
    return [rng.integers(2**60) for _, rng in draws]


@pytest.mark.parametrize("step", [0, 1, 7, 23])
def test_two_processes_draw_what_one_draws_with_twice_the_batch(step):
    """The number of GPUs must not change what is trained on, image, caption and noise alike."""
    one = script.draw_batch(BUCKETS, drawing(2, 5), step, 0, 1)
    two = [script.draw_batch(BUCKETS, drawing(1, 5), step, process, 2)[0] for process in (0, 1)]
    assert rows_of(one) == rows_of(two)
    one, two = numbers_of(one), numbers_of(two)
    assert one == two and one[0] != one[1]


def test_draws_depend_on_seed_and_step_alone():
    """A resumed run would train on other images and noise than the uninterrupted one."""
    draw = [script.draw_batch(BUCKETS, drawing(2, 5), step, 0, 1) for step in range(8)]
    again = [script.draw_batch(BUCKETS, drawing(2, 5), step, 0, 1) for step in reversed(range(8))][::-1]
    other = [script.draw_batch(BUCKETS, drawing(2, 6), step, 0, 1) for step in range(8)]
    assert [rows_of(d) for d in draw] == [rows_of(d) for d in again] != [rows_of(d) for d in other]
    numbers = [numbers_of(d) for d in draw]
    assert numbers == [numbers_of(d) for d in again]
    assert len(set(map(tuple, numbers))) == len(numbers)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_every_image_is_drawn_equally_often(batch_size):
    """Images of a rare shape would be overfitted, or come when a short training is over; a batch of two shapes cannot
    be stacked."""
    drawn = [rows_of(script.draw_batch(BUCKETS, drawing(batch_size, 0), step, 0, 1)) for step in range(16)]
    assert all(len(rows) == batch_size and len({BUCKETS[row] for row in rows}) == 1 for rows in drawn)
    for first in (drawn[:8], drawn[8:]):
        assert Counter(row for rows in first for row in rows) == dict.fromkeys(range(8), batch_size)
        assert abs(sum(rows[0] < 5 for rows in first[:4]) - 2.5) < 1
    assert drawn[:8] != drawn[8:]
    for shape in (range(5), range(5, 8)):  # in turn
        own = [row for rows in drawn for row in rows if row in shape]
        assert all(sorted(own[i : i + len(shape)]) == list(shape) for i in range(0, len(own), len(shape)))


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_prior_prompts_take_no_image_out_of_an_epoch(epochs, flags, tmp_path):
    """A third of the images would never be seen in a training of one epoch."""
    args = script.parse_args(
        flags(tmp_path / "out", prior_prompts=None, num_train_epochs=epochs, max_train_steps=None)
    )
    script.make_accelerator(args)
    dataset = script.check_inputs(args)[1]
    drawn = Counter()
    for step in range(args.max_train_steps):
        if script.prior_steps(step + 1, args) == script.prior_steps(step, args):
            drawn.update(rows_of(script.draw_batch(script.layouts_of(dataset, args), args, step, 0, 1)))
    assert drawn == dict.fromkeys(range(len(dataset)), epochs)


def test_batches_of_prior_prompts_have_noise_of_their_own():
    """The same noise in two consecutive batches would halve what a step sees."""
    args = drawing(1, 0, "prompts.txt")
    numbers = [numbers_of(script.draw_batch(BUCKETS, args, step, 0, 1))[0] for step in range(12)]
    assert len(set(numbers)) == 12


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_prior_prompt_is_drawn_before_any_is_drawn_again(processes, references, monkeypatch):
    """A prompt that chance leaves out for long is one whose kind of picture the model forgets."""
    monkeypatch.setattr(script, "images_per_micro_step", lambda args: 2)
    args = drawing(2 // processes, 0, "prompts.txt")
    prompts = ["a", "b", "c", "d", "e"]
    prior = {None: prompts} | ({~row: [f"edit of {row}"] for row in range(8)} if references else {})
    alone = []
    for step in range(60):
        drawn = []
        for process in range(processes):
            draws = script.draw_batch(BUCKETS, args, step, process, processes)
            shown = script.draw_prior(prior, draws, step, args, process)
            drawn += shown or []
            if shown and shown[0][0] is not None:
                assert shown == [(~row, f"edit of {row}") for row in rows_of(draws)]
        assert len(drawn) == (2 if step % 3 == 2 else 0)  # every third
        alone += [prompt for index, prompt in drawn if index is None]
    assert len(alone) == (20 if references else 40)
    epochs = [alone[i : i + 5] for i in range(0, len(alone), 5)]
    assert all(sorted(epoch) == prompts for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_rows_are_hashed_once_an_epoch():
    """Of a million rows, hashes in each step took a third of a second, and as many comparisons as rows times shapes
    half an hour."""
    hashes, comparisons = [], []

    class Layout(tuple):
        def __hash__(self):
            hashes.append(self)
            return super().__hash__()

        def __eq__(self, other):
            comparisons.append(self)
            return super().__eq__(other)

    layouts = script.Layouts(Layout((row // 2, 8)) for row in range(200))
    drawn = [rows_of(script.draw_batch(layouts, drawing(2, 0), step, 0, 1)) for step in range(100)]
    assert len(hashes) == 200 and len(comparisons) <= 200
    assert sorted(row for rows in drawn for row in rows) == list(range(200))
    assert all(layouts[first] == layouts[second] for first, second in drawn)


def state_flags(steps, count, batch_size=1, seed=5):
    return SimpleNamespace(rollout_steps=steps, states_per_rollout=count, train_batch_size=batch_size, seed=seed)


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 3)])
def test_every_state_is_drawn_equally_often(steps, count):
    """Of K images each state trains M: what is left to chance is noise, and what is left out is never learned."""
    drawn = script.draw_states(state_flags(steps, count), range(6 * steps))
    assert all(states == sorted(set(states)) and len(states) == count for states in drawn)
    cycles = [drawn[i : i + steps] for i in range(0, len(drawn), steps)]
    for cycle in cycles:
        assert Counter(k for states in cycle for k in states) == dict.fromkeys(range(steps), count)
    assert count == steps or cycles[0] != cycles[1] or cycles[1] != cycles[2]


@pytest.mark.parametrize("count", [1, 3])
def test_states_depend_on_seed_and_place_alone(count):
    """Neither a resume nor the number of processes or the size of batches may change what is trained."""

    def drawn(steps, processes=1, fsdp=False, **flags):
        args, found = state_flags(4, count, **flags), []
        for step, index in itertools.product(range(steps), range(processes)):
            accelerator = SimpleNamespace(num_processes=processes, process_index=index, is_fsdp2=fsdp)
            found += script.draw_states(args, script.places_in_run(step, args, accelerator))
        return found

    one = drawn(24)
    assert one == drawn(12, batch_size=2) == drawn(6, processes=2, batch_size=2)
    assert one != drawn(24, seed=6)
    # with FSDP, the images of all processes end at the same state
    twice = [states for states in one for _ in range(2)]
    assert twice == drawn(24, fsdp=True, batch_size=2) == drawn(24, fsdp=True, processes=2)
