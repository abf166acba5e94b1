"""`Experts` and `TopKRouter` against transformers' classes; ties, experts without tokens, bad input, no host sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import generator
from nn.module_checks import equal_to, refused
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from mmkernels.nn import Experts, TopKRouter
from mmkernels.testing.models import randomise

WIDTH, MLP, NUMBER, K = 24, 20, 8, 3
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "moe_intermediate_size": MLP,
    "n_routed_experts": NUMBER,
    "num_experts_per_tok": K,
}
NAN = float("nan")


def _x(tokens: int = 13) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=generator(tokens), dtype=torch.float64)


def _routed(tokens: int, choose: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Returns int64 index and float64 weight [tokens, K]; `choose`: scores [tokens, NUMBER] -> index."""
    scores = torch.rand(tokens, NUMBER, generator=generator(tokens + 1), dtype=torch.float64)
    index = scores.topk(K, 1).indices if choose is None else choose(scores)
    return index, torch.rand(index.shape, generator=generator(tokens + 2), dtype=torch.float64)


ROUTES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "random": None,
    "one expert gets all": lambda scores: torch.full((len(scores), 1), 5),
    "each token to one expert twice": lambda scores: scores.argmax(1, keepdim=True).expand(-1, 2),
    "the last half gets none": lambda scores: scores[:, :4].topk(K, 1).indices,
    "all experts": lambda scores: scores.argsort(1),
}


@pytest.mark.parametrize("route", ROUTES)
def test_experts_are_transformers(route: str) -> None:
    """Results, and gradients of x and of all experts."""
    theirs = randomise(DeepseekV2Experts(DeepseekV2Config(**SIZES)), 0)
    index, weight = _routed(13, ROUTES[route])
    call = lambda module, x: module(x, index, weight.to(x.dtype))
    names = {"gate_up": "gate_up_proj", "down": "down_proj"}
    equal_to(Experts(WIDTH, MLP, NUMBER), theirs, names, call, call, _x())


def test_the_gradient_of_the_weights() -> None:
    """The result is linear in them."""
    experts, x = Experts(WIDTH, MLP, NUMBER).double(), _x(6)
    index, weight = _routed(6)
    flow = torch.randn(6, WIDTH, generator=generator(4), dtype=torch.float64)
    (grad,) = torch.autograd.grad((experts(x, index, weight.requires_grad_()) * flow).sum(), weight)
    for place in range(K):
        alone = experts(x, index[:, place, None], torch.ones(6, 1, dtype=torch.float64))
        torch.testing.assert_close(grad[:, place], (alone * flow).sum(1))


def test_an_expert_without_tokens_is_not_read() -> None:
    """NaN in it reaches nothing; its gradient is 0."""
    experts = Experts(WIDTH, MLP, NUMBER).double()
    index, weight = _routed(7, ROUTES["the last half gets none"])
    want = experts(_x(7), index, weight)
    with torch.no_grad():
        experts.gate_up[5], experts.down[6] = NAN, NAN
    x = _x(7).requires_grad_()
    y = experts(x, index, weight)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    of_x, of_gate_up, of_down = torch.autograd.grad(y.sum(), (x, experts.gate_up, experts.down))
    assert bool(of_x.isfinite().all())
    assert not bool(of_gate_up[4:].any()) and not bool(of_down[4:].any())


def test_a_token_does_not_reach_another() -> None:
    experts = Experts(WIDTH, MLP, NUMBER).double()
    index, weight = _routed(9)
    bad = _x(9)
    bad[4] = NAN
    y, want = experts(bad, index, weight), experts(_x(9), index, weight)
    assert bool(y[4].isnan().all())
    torch.testing.assert_close(y[[0, 1, 2, 3, 5, 6, 7, 8]], want[[0, 1, 2, 3, 5, 6, 7, 8]], rtol=0, atol=0)


def test_no_token() -> None:
    experts = Experts(WIDTH, MLP, NUMBER)
    x = torch.zeros(0, WIDTH, requires_grad=True)
    y = experts(x, torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K))
    y.sum().backward()
    assert y.shape == (0, WIDTH) and x.grad is not None


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations(activation: str) -> None:
    experts = Experts(WIDTH, MLP, NUMBER, activation).double()
    x, (index, weight) = _x(5), _routed(5)
    want = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for place, expert in enumerate(chosen):
            gate, up = (experts.gate_up[expert] @ x[token]).chunk(2)
            hidden = getattr(nn.functional, activation)(gate) * up
            want[token] += weight[token, place] * (experts.down[expert] @ hidden)
    torch.testing.assert_close(experts(x, index, weight), want)


def test_sixteen_bits_are_summed_in_float32() -> None:
    """As float64 rounded once: outputs of 256 and of 1, which bfloat16 can't add."""
    experts = Experts(1, 1, 3, "relu").bfloat16()
    with torch.no_grad():
        experts.gate_up.fill_(1.0)
        experts.down.copy_(torch.tensor([256.0, 1.0, 1.0]).view(3, 1, 1))
    y = experts(torch.ones(1, 1).bfloat16(), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    assert y.dtype == torch.bfloat16 and float(y) == 258.0


def test_autocast() -> None:
    """Products in bfloat16, the sum in float32 and then in x's dtype."""
    experts, (index, weight) = Experts(WIDTH, MLP, NUMBER), _routed(5)
    x, weight = _x(5).float(), weight.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, index, weight)
    want = experts(x, index, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=0.05, atol=0.02)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        experts, router, x = Experts(WIDTH, MLP, NUMBER), TopKRouter(WIDTH, NUMBER, K), torch.empty(5, WIDTH)
        weight, index, _ = router(x)
    assert experts(x, index, weight).shape == (5, WIDTH)


def test_one_graph_for_any_number_of_tokens() -> None:
    experts, router = Experts(WIDTH, MLP, NUMBER), TopKRouter(WIDTH, NUMBER, K)

    def mixture(x: Tensor) -> Tensor:
        weight, index, _ = router(x)
        return experts(x, index, weight)

    torch._dynamo.reset()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = _x(tokens).float()
        torch.testing.assert_close(compiled(x), mixture(x))
        loss = lambda run, x=x: torch.autograd.grad(run(x).square().sum(), (experts.down, router.weight))
        torch.testing.assert_close(loss(compiled), loss(mixture))


def test_an_index_that_nothing_looks_at_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one that is negative, or too large."""
    experts = Experts(WIDTH, MLP, NUMBER).double()
    index, weight = _routed(6)
    bad = index.clone()
    bad[0, 1], bad[3, 0] = -1, NUMBER
    monkeypatch.setattr("mmkernels.nn.experts.check_range", lambda *args: None)
    want = experts(_x(6), index, weight.where(index == bad, 0.0))
    torch.testing.assert_close(experts(_x(6), bad, weight), want)


# The router.


def _chosen(theirs: Any, ours: TopKRouter, x: Tensor) -> None:
    """Asserts the same experts, weights and logits, and the same gradient of the weight."""
    logits, want, index = theirs(x)
    weight, found, ours_logits = ours(x)
    torch.testing.assert_close(ours_logits, logits)
    at, place = index.sort(1), found.sort(1)
    assert torch.equal(place.values, at.values)
    torch.testing.assert_close(weight.gather(1, place.indices), want.gather(1, at.indices))
    assert bool((weight.detach().diff(dim=1) <= 0).all()) or ours.correction_bias is not None
    flow = torch.cos(place.values.double()).float()
    (grad,) = torch.autograd.grad(weight.gather(1, place.indices), ours.weight, flow)
    (true,) = torch.autograd.grad(want.gather(1, at.indices), theirs.weight, flow)
    torch.testing.assert_close(grad, true)


@pytest.mark.parametrize(
    "options", [{}, {"method": "group_limited_greedy", "groups": 4, "top_groups": 2}], ids=["greedy", "groups"]
)
def test_the_router_of_v2(options: dict[str, Any]) -> None:
    method, groups, top = options.get("method", "greedy"), options.get("groups", 1), options.get("top_groups", 1)
    config = DeepseekV2Config(**SIZES, topk_method=method, n_group=groups, topk_group=top, routed_scaling_factor=2.5)
    theirs = randomise(DeepseekV2TopkRouter(config), 1)
    ours = TopKRouter(WIDTH, NUMBER, K, scale=2.5, **options)
    ours.load_state_dict(theirs.state_dict())
    _chosen(theirs, ours, _x(40).float())


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_router_of_v3(groups: int, top_groups: int, normalise: bool) -> None:
    config = DeepseekV3Config(
        **SIZES, n_group=groups, topk_group=top_groups, norm_topk_prob=normalise, routed_scaling_factor=1.5
    )
    theirs = randomise(DeepseekV3TopkRouter(config), 2)
    with torch.no_grad():
        theirs.weight.mul_(0.3 / theirs.weight.std())  # so that scores differ as much as the bias does
    theirs.e_score_correction_bias.copy_(torch.randn(NUMBER, generator=generator(3)) * 0.3 - 2)  # all are negative
    ours = TopKRouter(
        WIDTH, NUMBER, K, "sigmoid", groups=groups, top_groups=top_groups, method="noaux_tc", scale=1.5,
        normalise=normalise,
    )  # fmt: skip
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        assert ours.correction_bias is not None
        ours.correction_bias.copy_(theirs.e_score_correction_bias)
    _chosen(theirs, ours, _x(40).float())


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
def test_of_equal_scores_the_lowest_index_is_chosen(method: str) -> None:
    """All scores are equal, then those of experts 2 and 6 larger, and equal."""
    groups: dict[str, Any] = {} if method == "greedy" else {"groups": 4, "top_groups": 2}
    router = TopKRouter(1, NUMBER, K, method=method, **groups)
    with torch.no_grad():
        router.weight.zero_()
        assert router(torch.ones(2, 1))[1].tolist() == [[0, 1, 2]] * 2
        router.weight[2], router.weight[6] = 1.0, 1.0
        want = [2, 6, 0] if method == "greedy" else [2, 6, 3]  # of the groups 1 and 3
        assert router(torch.ones(2, 1))[1].tolist() == [want] * 2


def test_the_router_computes_in_float32() -> None:
    """Of 16-bit tokens and under autocast; the results are float32."""
    router = TopKRouter(WIDTH, NUMBER, K)
    x = _x().bfloat16()
    want = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_router_stays_float32() -> None:
    """A bias of a few units rounded to bfloat16 would send a third of the tokens to other experts."""
    router = TopKRouter(32, 72, 6, "sigmoid", method="noaux_tc")
    assert router.correction_bias is not None
    router.correction_bias.copy_(5 + 0.1 * torch.randn(72))
    bias, weight = router.correction_bias.clone(), router.weight.detach().clone()
    router.to(torch.bfloat16)
    assert torch.equal(router.correction_bias, bias) and torch.equal(router.weight, weight)
    assert router.double().weight.dtype is torch.float64
    with torch.device("meta"):
        empty = TopKRouter(32, 72, 6)
    assert empty.to_empty(device="cpu").half().weight.dtype is torch.float32


def test_nan_chooses_experts_that_exist() -> None:
    weight, index, _ = TopKRouter(WIDTH, NUMBER, K)(torch.full((2, WIDTH), NAN))
    assert bool(weight.isnan().all()) and bool(((index >= 0) & (index < NUMBER)).all())


def test_bad_input_is_refused_by_name() -> None:
    experts, x = Experts(WIDTH, MLP, NUMBER), torch.zeros(2, WIDTH)
    index, weight = torch.zeros(2, K, dtype=torch.int64), torch.zeros(2, K)
    router = lambda *args, **more: lambda: TopKRouter(*args, **more)
    sizes: Any = Experts
    limited: dict[str, Any] = {"method": "group_limited_greedy"}
    refused(
        [
            (lambda: Experts(0, 1, 1), ValueError, "^width must be a positive integer, got 0"),
            (lambda: sizes(1, 1.5, 1), ValueError, "^mlp must be a positive integer, got 1.5"),
            (lambda: Experts(1, 1, True), ValueError, "^num_experts must be a positive integer, got True"),
            (lambda: Experts(1, 1, 1, "swish"), ValueError, "^activation must be one of gelu, relu, silu, got 'swish'"),
            (lambda: experts([1], index, weight), TypeError, "^x must be a tensor, got list"),
            (lambda: experts(x[None], index, weight), ValueError, r"^x must be \[T, 24\], got shape \(1, 2, 24\)"),
            (lambda: experts(x.long(), index, weight), TypeError, "^x must be float16, .* got torch.int64"),
            (
                lambda: experts(x.double(), index, weight),
                TypeError,
                "^x must have the experts' dtype torch.float32, got",
            ),
            (lambda: experts(x, index.int(), weight), TypeError, "^index must be int64, got torch.int32"),
            (lambda: experts(x, index[:1], weight), ValueError, r"^index must be \[2, k\].*got shape \(1, 3\)"),
            (lambda: experts(x, index[:, :0], weight), ValueError, r"^index must be \[2, k\].*got shape \(2, 0\)"),
            (lambda: experts(x, index + 8, weight), ValueError, "^index must be from 0 to 7, got 8"),
            (lambda: experts(x, index - 1, weight), ValueError, "^index must be from 0 to 7, got -1"),
            (lambda: experts(x, index, weight[:, :1]), ValueError, r"^weight must be \[2, 3\] as index is"),
            (lambda: experts(x, index, weight.long()), TypeError, "^weight must be float16, .* got torch.int64"),
            (lambda: experts(x, index, weight.to("meta")), ValueError, "^weight must be on x's device cpu, got meta"),
            (router(0, 8, 2), ValueError, "^width must be a positive integer"),
            (router(4, 8, 9), ValueError, r"^k must be at most 8, the experts of 1 group\(s\), got 9"),
            (router(4, 8, 2, "tanh"), ValueError, "^scoring must be one of softmax, sigmoid, got 'tanh'"),
            (router(4, 8, 2, method="best"), ValueError, "^method must be one of greedy, .*got 'best'"),
            (router(4, 8, 2, groups=2), ValueError, '^groups must be 1 where method is "greedy".*got 2'),
            (router(4, 8, 2, groups=3, **limited), ValueError, "^groups must divide num_experts = 8, got 3"),
            (router(4, 8, 2, groups=2, top_groups=3, **limited), ValueError, "^top_groups must be at most groups = 2"),
            (router(4, 8, 5, groups=2, **limited), ValueError, "^k must be at most 4, the experts of 1 group"),
            (router(4, 8, 1, groups=8, method="noaux_tc"), ValueError, "^groups must leave each group two experts"),
            (router(4, 8, 2, scale=NAN), ValueError, "^scale must be a finite number, got nan"),
            (router(4, 8, 2, normalise=1), TypeError, "^normalise must be a bool, got int"),
            (lambda: TopKRouter(4, 8, 2)(torch.zeros(3, 5)), ValueError, r"^x must be \[T, 4\], got shape \(3, 5\)"),
            (lambda: TopKRouter(4, 8, 2)(torch.zeros(3, 4).int()), TypeError, "^x must be float16"),
        ]
    )
