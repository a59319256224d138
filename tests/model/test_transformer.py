"""What may influence what, what a batch may change, and what the identities promise."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from unif2ace.errors import UserError
from unif2ace.model.token_moe import TokenMoE, balance_loss, router_logits, z_loss
from unif2ace.model.transformer import UniF2ace
from unif2ace.vocabulary import concatenate, pack_generation, pack_understanding


def run(model, made, **changes):
    with torch.no_grad():
        return model(made.batch, **{**made.arguments, **changes}).hidden


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def rows_of(batch, hidden):
    starts = batch.layout.starts
    return [hidden[start:end] for start, end in itertools.pairwise(starts)]


def test_generation_text_rows_never_see_image_rows(model, make):
    made = make("generation", [5, 2])
    other = (made.codes + 5) % 17
    changed = made.batch.with_codes(made.vocabulary, other)
    before = run(model, made)
    made.batch = changed
    after = run(model, made, mask_ratio=1 - made.arguments["mask_ratio"])
    for x, y, sequence in zip(rows_of(changed, before), rows_of(changed, after), changed.layout.sequences, strict=True):
        close(x[: sequence.text], y[: sequence.text])
        assert not torch.allclose(x[sequence.text :], y[sequence.text :])


def test_understanding_image_rows_never_see_text(model, make):
    made = make("understanding", [5, 2])
    before = run(model, made)
    made.batch = pack_understanding(made.vocabulary, made.codes, [[(t + 1) % 40 for t in text] for text in made.texts])
    after = run(model, made)
    for x, y, sequence in zip(
        rows_of(made.batch, before), rows_of(made.batch, after), made.batch.layout.sequences, strict=True
    ):
        close(x[: sequence.prefix], y[: sequence.prefix])
        assert not torch.allclose(x[sequence.prefix + 1 :], y[sequence.prefix + 1 :])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's, about torch's own settings
def test_compiled_layers_compute_the_same(build_model, make):
    model, parts = build_model(), [make("generation", [5, 2]), make("understanding", [4, 0, 1])]
    expected = [run(model, made) for made in parts]
    model.compile_layers()
    for made, hidden in zip(parts, expected, strict=True):
        close(run(model, made), hidden)


@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_order_of_sequences_does_not_matter(model, make, task):
    made = make(task, [3, 0, 6, 1])
    order = [2, 0, 3, 1]
    expected = rows_of(made.batch, run(model, made))
    texts = [made.texts[i] for i in order]
    if task == "generation":
        made.batch = pack_generation(made.vocabulary, texts, made.codes[order])
        changes = {"mask_ratio": made.arguments["mask_ratio"][order]}
    else:
        made.batch = pack_understanding(made.vocabulary, made.codes[order], texts)
        changes = {"features": {k: v[order] for k, v in made.arguments["features"].items()}}
    for got, i in zip(rows_of(made.batch, run(model, made, **changes)), order, strict=True):
        close(got, expected[i])


def test_mixed_batch_equals_separate_batches(model, make):
    generation, understanding = make("generation", [3, 6]), make("understanding", [4, 0])
    more = make("understanding", [5], seed=9)
    parts = [generation, understanding, more]
    expected = torch.cat([run(model, part) for part in parts])
    features = {
        name: torch.cat([part.arguments["features"][name] for part in (understanding, more)])
        for name in ("clip", "face")
    }
    arguments = {"features": features, **generation.arguments}
    with torch.no_grad():
        grouped = model(concatenate([part.batch for part in parts]), **arguments).hidden
        interleaved = model(concatenate([understanding.batch, generation.batch, more.batch]), **arguments).hidden
    close(grouped, expected)
    close(interleaved, torch.cat([run(model, part) for part in (understanding, generation, more)]))


def test_scale_zero_is_the_model_without_sequence_moe(build_model, make):
    model = build_model()
    made = make("understanding", [4, 2])
    plain = build_model(sequence_moe=None)
    with torch.no_grad():
        for layer in model.layers:
            layer.sequence_moe.scale.zero_()
    own = plain.state_dict()
    plain.load_state_dict({name: model.state_dict()[name] for name in own})
    close(run(model, made), run(plain, made, features=None))


def test_dense_model_has_no_plans_and_needs_no_features(build_model, make):
    model = build_model(token_moe=None, sequence_moe=None)
    made = make("understanding", [4])
    with torch.no_grad():
        output = model(made.batch)
    assert output.plans == []
    assert output.sequence_plans == []


def test_equal_experts_make_the_dense_ffn(build_model, make):
    """Routed experts that are all the same act as one FFN, whatever the router says: the gates sum to one."""
    model = build_model(sequence_moe=None)
    with torch.no_grad():
        for layer in model.layers:
            moe = layer.ffn
            for tensor in (moe.up_proj, moe.up_bias, moe.down_proj, moe.down_bias):
                tensor.copy_(tensor[:1].expand_as(tensor))
            moe.router.weight.mul_(5)
    made = make("generation", [4, 1])
    first = run(model, made)
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.router.weight.normal_()
    close(run(model, made), first)


def test_images_share_what_follows_from_their_mask_ratio(model, make):
    generation, understanding = make("generation", [3, 6, 2, 5]), make("understanding", [4, 0])
    generation.batch = concatenate([understanding.batch, generation.batch])
    generation.arguments |= understanding.arguments
    ratios, which = torch.tensor([0.75, 0.125]), torch.tensor([1, 0, 1, 1])
    results = []
    for arguments in ({"mask_ratio": ratios[which]}, {"mask_ratio": ratios, "ratio_of_image": which}):
        hidden = model(generation.batch, **{**generation.arguments, **arguments}).hidden
        parameters = list(model.mask_ratio_embedding.parameters())
        results.append([hidden, *torch.autograd.grad(hidden.pow(3).sum(), parameters)])
    for shared, expected in zip(*results, strict=True):
        close(shared, expected)
    assert results[0][1].abs().sum() > 0


def test_missing_features_are_refused_unless_the_configuration_has_none(model, build_model, make):
    made = make("understanding", [4])
    with pytest.raises(UserError, match="needs the feature 'clip'"):
        run(model, made, features=None)
    with pytest.raises(UserError, match="'face' must be"):
        run(model, made, features={**made.arguments["features"], "face": torch.zeros(1, 1, 3)})
    free = dataclasses.replace(model.config.sequence_moe, understanding_experts=("copy", "copy", "zero"))
    run(build_model(sequence_moe=free), made, features=None)


def test_wrong_inputs_are_refused(model, make):
    made = make("generation", [4, 2])
    with pytest.raises(UserError, match=r"mask_ratio must be \[2\]"):
        run(model, made, mask_ratio=None)
    with pytest.raises(UserError, match=r"mask_ratio must be \[2\]"):
        run(model, made, mask_ratio=torch.rand(3))
    with pytest.raises(UserError, match=r"ratio_of_image must be \[2\], one per generated image, got \[3\]"):
        run(model, made, mask_ratio=torch.rand(1), ratio_of_image=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"mask_ratio must be \[2\], .*, got none"):
        run(model, made, mask_ratio=None, ratio_of_image=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="images must have 9 tokens, got 4"):
        model(pack_generation(made.vocabulary, [[1]], torch.zeros(1, 4, dtype=torch.int64)))


def test_every_parameter_receives_a_gradient(model, make):
    generation, understanding = make("generation", [3, 6, 2, 5]), make("understanding", [4, 0, 3, 2])
    batch = concatenate([understanding.batch, generation.batch])
    output = model(batch, **generation.arguments, **understanding.arguments)
    loss = output.hidden.pow(3).sum() + model.head(output.hidden).logsumexp(1).sum()
    bounds = model.layers[0].ffn.group_bounds
    (loss + balance_loss(output.plans, bounds) + z_loss(output.plans)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad(set_to_none=True)
    # With few images some sequence experts may stay unchosen; every other parameter must learn.
    assert [name for name in missing if ".sequence_moe." not in name and "mask_ratio" not in name] == []


def test_balance_loss_is_the_written_out_sum(model, make):
    made = make("generation", [3, 6])
    with torch.no_grad():
        plans = model(made.batch, **made.arguments).plans
    bounds = model.layers[0].ffn.group_bounds
    assert bounds == (0, 3, 6)
    expected = 0.0
    for plan in plans:
        chosen = torch.bincount(plan.experts.flatten().long(), minlength=6).double()
        share = chosen / chosen.sum()
        expected += 2.5 * 3 * sum(float(share[i] * plan.importance[i]) for i in range(3, 6)) / len(plans)
    assert float(balance_loss(plans, bounds, [7.0, 2.5])) == pytest.approx(expected)
    assert float(z_loss(plans)) == pytest.approx(float(torch.stack([p.logsumexp for p in plans]).pow(2).mean()))
    with pytest.raises(UserError, match="expected 2 group weights, got 1"):
        balance_loss(plans, bounds, [1.0])
    with pytest.raises(UserError, match="got none"):
        z_loss([])


def test_tokens_choose_experts_of_their_task_only(model, make):
    generation, understanding = make("generation", [3]), make("understanding", [4])
    batch = concatenate([generation.batch, understanding.batch])
    with torch.no_grad():
        output = model(batch, **generation.arguments, **understanding.arguments)
    for plan in output.plans:
        assert torch.equal((plan.experts >= 3).int(), batch.layout.token_group[:, None].expand_as(plan.experts))
    for plan in output.sequence_plans:  # understanding images come first
        assert (plan.experts[0] < 4).all()
        assert (plan.experts[1] >= 4).all()


def test_initialisation_from_scratch(build_model):
    model = UniF2ace(build_model().config)
    config = model.config
    down = model.layers[0].ffn.down_proj.std().item()
    assert down == pytest.approx(config.init_std / (2 * config.num_layers) ** 0.5, rel=0.1)
    assert model.layers[0].ffn.up_proj.std().item() == pytest.approx(config.init_std, rel=0.1)
    assert model.layers[1].sequence_moe.scale.item() == pytest.approx(config.sequence_moe.scale_init)
    assert isinstance(model.layers[0].ffn, TokenMoE)
    assert (model.layers[0].norm.weight == 1).all()


def test_bfloat16_stays_close_to_float64(build_model, make):
    model = build_model(init_std=0.05)
    made = make("generation", [5, 3])
    expected = run(model, made)
    got = run(model.bfloat16(), made)
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_router_logits_stay_fp32_under_mixed_precision():
    h, weight = torch.randn(5, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router_logits(h.bfloat16(), weight).dtype == torch.float32
        logits = router_logits(h, weight)
    torch.testing.assert_close(logits, h @ weight.T)
