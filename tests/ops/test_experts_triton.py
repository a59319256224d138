"""The Triton launches of the experts: every path of the kernels, addresses beyond 2^31, rules and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.shapes import EXPERTS, ExpertShape
from tests.ops.test_experts import BACKENDS, plan_of, problem
from tests.oracle import assert_close, poisoned
from unif2ace.ops import _registry, grouped_gemm
from unif2ace.ops.experts import reference_expert_mlp
from unif2ace.resources.calls import CALLS
from unif2ace.resources.kernel import SHARED_LIMITS

if "triton" not in BACKENDS:
    pytest.skip("Triton kernels cannot run on this device", allow_module_level=True)

from benchmarks import timing, tune_experts
from unif2ace.kernels import experts, experts_config, experts_products
from unif2ace.kernels._device import INTERPRETED, compiling_for, multiprocessors
from unif2ace.kernels.experts_config import Config, Key, Product

# Small blocks, so that few rows are several of them; with the arguments that each path is tried on.
PLAIN = Config(16, 16, 16, warps=4, stages=2, piece=16)
PATHS = {
    "pointers": (PLAIN, "gelu_tanh", False),
    "pointers, gated": (Config(16, 32, 32, warps=4, stages=2, piece=8), "geglu", False),
    "tma, groups": (PLAIN._replace(group_m=1, programs=3), "gelu_tanh", True),
    "halves": (PLAIN._replace(piece=8, programs=4, split=True), "relu2", False),
    "halves, tma, gated": (PLAIN._replace(piece=8, programs=4, split=True), "swiglu", True),
    "tma, gated": (Config(32, 16, 32, warps=4, stages=2, piece=8), "swiglu", True),
    "swap": (Config(16, 32, 32, warps=4, stages=2, swap=True), "silu", False),
    "swap, tma, gated": (Config(16, 32, 16, warps=4, stages=2, swap=True), "geglu", True),
}


@contextmanager
def launched_with(config: Config) -> Iterator[list[dict[str, object]]]:
    """Every product is launched with `config`; gives the constants of the launches."""
    launches: list[dict[str, object]] = []
    kernel = experts_products.grouped_product_kernel

    class Recording:
        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*arguments: object, **constants: object) -> None:
                launches.append(constants)
                kernel[grid](*arguments, **constants)

            return launch

    with (
        mock.patch.object(experts_config, "choose", return_value=config),
        mock.patch.object(experts, "grouped_product_kernel", Recording()),
    ):
        yield launches


def arguments_of(shape: ExpertShape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What `expert_mlp` as registered takes up to the activation, with sentinels and an empty expert."""
    tensors, _ = problem(shape)
    choices = torch.randint(shape.experts + 1, (shape.tokens, shape.top_k))
    choices[choices == 1] = 0
    plan = plan_of(choices, tensors["weights"], shape.experts)
    x, w_up, w_down, b_up, b_down = (tensors[name].to(dtype) for name in ("x", "w_up", "w_down", "b_up", "b_down"))
    return x, plan.weights, plan.offsets, plan.order, plan.position, w_up, w_down, b_up, b_down


@pytest.mark.parametrize(("config", "activation", "tma"), PATHS.values(), ids=PATHS.keys())
def test_every_path(config: Config, activation: str, tma: bool):
    if tma and not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    dtype = torch.float16 if tma else torch.float32
    arguments = arguments_of(ExpertShape(23, 40, 24, 4, 2, activation), dtype)
    truth = reference_expert_mlp(*(x.double() if x.is_floating_point() else x for x in arguments), activation)
    plain = reference_expert_mlp(*arguments, activation)
    op = _registry.registered("triton", "expert_mlp")
    with launched_with(config) as launches, compiling_for(90) if tma else nullcontext():
        with poisoned(*(x.nbytes for x in plain)):
            found = op(*arguments, activation, True, None)
        assert torch.equal(op(*arguments, activation, False, None)[0], found[0])
    assert all(bool(launch["TMA_B"]) == tma for launch in launches) or not INTERPRETED
    for name, values in zip(("y", "pre-activation"), zip(found, truth, plain, strict=True), strict=True):
        assert_close(name, *values)
    assert not found[1][int(arguments[2][-1]) :].any()


@pytest.mark.parametrize(("depth", "tma"), [(40, True), (36, False)])
def test_tma_only_where_it_can_read(depth: int, tma: bool):
    """Rows of 72 bytes are no multiple of 16; then, and for other strides, pointers give the same."""
    a, b = torch.randn(21, depth).half(), torch.randn(3, 10, depth).half()
    offsets = torch.tensor([0, 4, 4, 19], dtype=torch.int32)
    with launched_with(PLAIN) as launches, compiling_for(90):
        found = grouped_gemm(a, b, offsets, backend="triton")
        strided = grouped_gemm(a, b.mT.contiguous().mT, offsets, backend="triton")
        gated = torch.empty(21, 5).half()
        experts.grouped_product(a, b[::2], None, offsets[:3], None, gated, activation="swiglu")
    assert [launch["TMA_B"] for launch in launches] == [tma, False, False] or not INTERPRETED
    torch.testing.assert_close(found, grouped_gemm(a, b, offsets, backend="reference"))
    assert torch.equal(strided, found)
    gate, up = (a @ b[0].T)[:4].chunk(2, dim=1)
    torch.testing.assert_close(gated[:4], torch.nn.functional.silu(gate) * up, rtol=1e-2, atol=1e-2)


def test_a_row_does_not_depend_on_its_place():
    """Whole numbers, so that every sum is exact: the interpreter's products of tiles round a row by its place."""
    a, b = torch.randint(-8, 9, (200, 72)).float(), torch.randint(-8, 9, (2, 33, 72)).float()
    whole = grouped_gemm(a, b, torch.tensor([0, 150, 200]), backend="triton")
    assert torch.equal(whole, torch.cat([a[:150] @ b[0].T, a[150:] @ b[1].T]))
    for low, high in ((0, 1), (17, 100), (149, 200)):
        offsets = torch.tensor([low, max(low, min(high, 150)), high]) - low
        assert torch.equal(grouped_gemm(a[low:high], b, offsets, backend="triton"), whole[low:high])


@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gather"])
@pytest.mark.parametrize(("depth", "width"), [(0, 3), (4, 0)], ids=["no depth", "no width"])
def test_matrices_without_elements(depth: int, width: int, gathered: bool):
    """A sum of no terms is 0 and leaves the bias; nothing is divided by a size of nothing."""
    a, b, bias = torch.randn(5, depth), torch.randn(2, width, depth), torch.randn(2, width)
    leaves = [x.requires_grad_(True) for x in (a, b, bias)]
    offsets, gather = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 1, 2, 4]) if gathered else None
    y = grouped_gemm(a, b, offsets, bias=bias, gather=gather, backend="triton")
    grads = torch.autograd.grad(y.sum(), leaves)
    expected = torch.cat([bias[:1].expand(2, width), bias[1:].expand(2, width), bias.new_zeros(1, width)])
    assert torch.equal(y, expected)
    assert [grad.shape for grad in grads] == [x.shape for x in leaves]
    assert not grads[0].any()
    assert torch.equal(grads[2], torch.full_like(bias, 2.0))


@pytest.mark.gpu  # the interpreter has one configuration for every load
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "rows"])
@pytest.mark.parametrize("parts", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_load_gives_a_row_the_same_bits(dtype: torch.dtype, parts: int, gather: bool):
    """The configurations that a token meets as the batch grows: either operand on the left, every height and width."""
    a, b = torch.randn(400, 200).to(dtype), torch.randn(3, parts * 136, 200).to(dtype)
    offsets, index = torch.tensor([0, 300, 300, 390], dtype=torch.int32), torch.randperm(400).int() if gather else None
    activation, found = "swiglu" if parts == 2 else "gelu_tanh", {}
    for rows in (1, 9, 33, 64, 256, 8192):  # per expert
        product = Product(dtype, 3 * rows, 3, 136, 200, parts, gather)
        config = experts_config.rules(product, experts_config.chip_of(a.device), multiprocessors(a.device))
        out = found[config] = a.new_full((400, 136), torch.nan)
        experts.grouped_product(a, b, None, offsets, index, out, activation=activation, rest=True, config=config)
    first, *others = found.values()
    assert others or dtype == torch.float32
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.skipif(not INTERPRETED, reason="takes memory by address only, which GPUs do not")
@pytest.mark.parametrize("wide", ["rows", "columns", "matrices", "rows of matrices"])
def test_addresses_beyond_32_bits(wide: str):
    """Few elements, far apart: pages that nobody touches cost nothing."""
    far = 2**30 + 8

    def spread(x: torch.Tensor, axis: int) -> torch.Tensor:
        strides = [far if i == axis else s for i, s in enumerate(x.stride())]
        memory = torch.empty(1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)), dtype=x.dtype)
        return memory.as_strided(x.shape, strides).copy_(x)

    a, b, offsets = torch.randn(5, 4).half(), torch.randn(4, 5, 4).half(), torch.tensor([0, 2, 2, 3, 5])
    expected = grouped_gemm(a, b, offsets, backend="triton")
    if wide in ("rows", "columns"):
        a = spread(a, ("rows", "columns").index(wide))
    else:
        b = spread(b, ("matrices", "rows of matrices").index(wide))
    assert experts._is_wide(a) or experts._is_wide(b)
    assert torch.equal(grouped_gemm(a, b, offsets, backend="triton"), expected)


def test_what_counts_as_wide():
    def meta(*strides: int) -> torch.Tensor:
        return torch.empty(1, device="meta").as_strided((4, 2**10), strides)

    assert not experts._is_wide(meta(2**10, 1))
    assert not experts._is_wide(meta(2**28, 1))
    assert experts._is_wide(meta(2**29, 1))
    assert experts._is_wide(meta(1, 2**21))


# ----------------------------------------------------------------------------------------------------- configurations

LOADS = (1, 3, 8, 9, 32, 33, 64, 65, 4096)


def products() -> list[Product]:
    kinds = [(torch.bfloat16, 1, True), (torch.float16, 2, True), (torch.float32, 2, True), (torch.float32, 1, False)]
    kinds.append((torch.bfloat16, 1, False))
    return [Product(d, rows, 16, 512, 2048, p, g) for rows in (4, *(16 * r for r in LOADS)) for d, p, g in kinds]


def shared_bytes(config: Config, product: Product, chip: int) -> int:
    """Of the loop's buffers: one for each stage, on A100 less the one whose operands are in registers."""
    step = (config.block_m + product.parts * config.block_n) * config.block_k * product.dtype.itemsize
    return (config.stages if chip >= 90 else config.stages - 1) * step


@pytest.mark.parametrize("chip", SHARED_LIMITS)
def test_rules_and_candidates_are_possible(chip: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "INTERPRETED", False)
    for product in products():
        candidates = experts_config.candidates(product, chip, 100)
        assert candidates[0] == experts_config.rules(product, chip, 100)
        assert len(set(candidates)) == len(candidates)
        assert shared_bytes(candidates[0], product, chip) * candidates[0].programs <= SHARED_LIMITS[chip]
        for config in candidates:
            sizes = (config.block_m, config.block_n, config.block_k, config.piece, config.group_m)
            assert all(size & (size - 1) == 0 for size in sizes)
            accumulator = config.block_m * product.parts * config.block_n / (32 * config.warps)
            assert accumulator <= 128  # registers of a thread; it has 255
            if chip >= 90 and product.dtype.itemsize == 2:  # the height of wgmma, for each warpgroup
                height = product.parts * config.block_n if config.swap else config.block_m
                assert height >= 64
                assert config.warps % 4 == 0


def test_few_blocks_are_small_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "INTERPRETED", False)

    def block(rows: int, width: int, chip: int = 90) -> tuple[int, int]:
        config = experts_config.rules(Product(torch.bfloat16, rows, 16, width, 2048, 1, True), chip, 132)
        return config.block_m, config.block_n

    assert block(32768, 2048) == block(16384, 1024) == (128, 256)
    assert block(2048, 512) == (128, 256)  # 48 blocks in halves; of 64 x 128 there would be 160, two rounds
    assert block(1024, 256) == (64, 128)
    assert block(32768, 2048, 80) == (128, 128)


def test_few_blocks_have_much_in_flight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "INTERPRETED", False)

    def in_flight(rows: int, parts: int, chip: int = 90) -> int:
        config = experts_config.rules(Product(torch.bfloat16, rows, 16, 512, 2048, parts, True), chip, 132)
        return config.programs * (config.stages - 1)

    assert in_flight(4, 1) == in_flight(4, 2) == in_flight(16, 1) == 7  # 32 to 128 blocks
    assert in_flight(64, 1) == in_flight(4, 1, chip=80) == 6


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("chip", SHARED_LIMITS)
def test_steps_over_rows_end_where_tiles_do(chip: int, interpreted: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "INTERPRETED", interpreted)
    device = torch.device("meta")
    with compiling_for(chip):
        for product in products():
            (rows,) = experts_config.row_gradients([product], device)
            assert rows.block_m % experts_config.matrix_gradient(product.dtype, product.gather, device).block_k == 0


@pytest.mark.parametrize(("capability", "chip"), [(75, 80), (80, 80), (89, 80), (90, 90), (103, 90), (120, 80)])
def test_every_device_has_rules(capability: int, chip: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "capability", lambda device: capability)
    assert experts_config.chip_of(torch.device("meta")) == chip


def entry(product: Product, config: Config) -> dict[str, object]:
    return {"product": product.key._asdict(), "config": config._asdict()}


def test_the_table_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experts_config, "FOLDER", tmp_path)
    known = Product(torch.bfloat16, 1000, 16, 512, 2048, 1, True)
    close, other = known._replace(rows=1024), known._replace(rows=4096)
    config = Config(16, 32, 64, warps=4, stages=3, swap=True)
    device = torch.device("meta")
    with compiling_for(90):
        tune_experts.merge(experts_config.path_of_table(90), [entry(known, config)], {"device": "a GPU"})
        assert experts_config.choose(known, device) == experts_config.choose(close, device) == config
        assert experts_config.choose(other, device) == experts_config.rules(other, 90, 132)
        better = config._replace(stages=4)
        tune_experts.merge(experts_config.path_of_table(90), [entry(close, better), entry(other, config)], {})
        assert experts_config.choose(known, device) == better
        assert experts_config.choose(other, device) == config
        labels = [call.label for call in CALLS["experts"]()]
        assert all(f"measured {tuple(product.key)}" in labels for product in (known, other))
    with compiling_for(80):
        assert experts_config.choose(known, device) == experts_config.rules(known, 80, 108)
    experts_config.forget_tables()


@pytest.mark.parametrize("path", sorted(experts_config.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_shipped_tables_are_well_formed(path: Path):
    entries = json.loads(path.read_text())["entries"]
    keys = [Key(**found["product"]) for found in entries]
    assert len(set(keys)) == len(keys)
    for found in entries:
        assert found["microseconds"] <= found["rules_microseconds"]
        assert {"device", "commit", "date"} <= found["measured"].keys()


def test_tuning_finds_the_fastest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Clock(timing.CpuClock):
        """Seconds by the height of the last tile: nothing else differs between the candidates here."""

        def seconds(self, call: timing.Call, repeats: int) -> float:
            call()
            return repeats * heights[-1] * 1e-3

    heights, run = [], experts.grouped_product

    def grouped_product(*arguments: object, config: Config, **options: object) -> None:
        heights.append(config.block_m)
        if config.block_m != 64:  # a wrong kernel: it writes nothing
            run(*arguments, config=config, **options)

    monkeypatch.setattr(experts, "grouped_product", grouped_product)
    device = torch.get_default_device()
    for product in tune_experts.products_of(ExpertShape(4, 16, 16, 2, 2, "swiglu"), torch.float32):
        configs = [PLAIN._replace(block_m=block_m) for block_m in (32, 16, 64)]
        found = tune_experts.fastest(product, configs, device, Clock())
        assert found["config"] == configs[1]._asdict()
        assert (found["microseconds"], found["rules_microseconds"]) == (16000.0, 32000.0)
        assert Key(**found["product"]) == product.key
        assert "left out (64, " in capsys.readouterr().out


def test_tuned_products_are_those_that_are_launched():
    shape = EXPERTS["h100-sonic"]
    up, down = tune_experts.products_of(shape, torch.bfloat16)
    seen = []

    def choose(product: Product, device: torch.device) -> Config:
        seen.append(product)
        raise LookupError

    x, w_up = torch.empty(shape.tokens, shape.hidden), torch.empty(shape.experts, shape.up_rows, shape.hidden)
    act, w_down = torch.empty(up.rows, shape.inner), torch.empty(shape.experts, shape.hidden, shape.inner)
    offsets, order = torch.empty(shape.experts + 1, dtype=torch.int32), torch.empty(up.rows, dtype=torch.int32)
    with mock.patch.object(experts_config, "choose", choose):
        for a, b, index, out, activation in (
            (x, w_up, order, act, shape.activation),
            (act, w_down, None, torch.empty(up.rows, shape.hidden), "none"),
        ):
            tensors = [t.to("meta", torch.bfloat16) for t in (a, b, out)]
            with pytest.raises(LookupError):
                experts.grouped_product(*tensors[:2], None, offsets, index, tensors[2], activation=activation)
    assert seen == [up, down]
