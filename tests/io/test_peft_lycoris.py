"""LOHA and LOKR of HF PEFT: convolutions of every form, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.adapters.lokr import factorization
from flora_jax.core import ops
from flora_jax.core.errors import FormatError, PlanError, StructureError
from flora_jax.io.names import OIHW, OUT_IN, NameMap, Rule
from flora_jax.io.safetensors import TensorFiles, save_one

OIW = (2, 1, 0)
NAMES = NameMap(
    rules=(
        Rule("(conv.)/kernel", r"\1.weight", OIHW),
        Rule("line/kernel", "line.weight", OIW),
        Rule("head/kernel", "head.weight", OUT_IN),
        Rule("(.+)/bias", r"\1.bias"),
    )
)
AXES = {"conv1": OIHW, "conv2": OIHW, "point": OIHW, "line": OIW, "head": OUT_IN}
SPECS = {"line/kernel": flora.KernelSpec.conv(1)}
IMAGES = np.random.default_rng(0).standard_normal((2, 7, 7, 3)).astype(np.float32)
SHAPES = {"conv1": (3, 3, 3, 6), "conv2": (3, 2, 6, 8), "line": (3, 8, 6), "head": (6, 12)}
PARAMS = {n: {"kernel": jnp.ones(s), "bias": jnp.zeros(s[-1])} for n, s in SHAPES.items()}


def ours(params, x):
    """Two convolutions (one strided), a 1-D one over what is left, and a linear head."""
    conv1, conv2, line, head = (params[name] for name in ("conv1", "conv2", "line", "head"))
    x = ops.conv(x, conv1["kernel"], padding=((1, 1), (1, 1))) + conv1["bias"]
    x = ops.conv(jnp.tanh(x), conv2["kernel"], strides=2, padding="VALID") + conv2["bias"]
    x = jnp.tanh(x).reshape(x.shape[0], -1, 8)
    x = ops.conv(x, line["kernel"], padding="VALID") + line["bias"]
    return ops.dot(jnp.tanh(x).mean(1), head["kernel"]) + head["bias"]


def folder_of(path, rules, **kw):
    plan = flora.plan(PARAMS, rules, specs=SPECS)
    adapters = jax.tree.map(lambda x: x + 1, flora.init(plan, jax.random.key(0), PARAMS))
    io.save_peft(path, adapters, plan, PARAMS, NAMES, **kw)
    return plan, adapters


def edit_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(path):
    return io.load_peft(path, PARAMS, NAMES, specs=SPECS)


# Without torch ----------------------------------------------------------------------------------
RULES = {
    "loha": {"(conv1|head)/kernel": flora.LoHa(rank=2)},
    "loha-effective": {"(conv1|line)/kernel": flora.LoHa(rank=2, effective_conv=True)},
    "lokr": {"head/kernel": flora.LoKr(rank=1), "conv2/kernel": flora.LoKr(rank=4, alpha=2.5)},
    "lokr-effective": {
        ".*/kernel": flora.LoKr(
            rank=1, effective_conv=True, decompose_both=True, initializer="lycoris"
        )
    },
}


@pytest.mark.parametrize("case", RULES)
def test_round_trip(tmp_path, case):
    plan, adapters = folder_of(tmp_path, RULES[case])
    again, arrays = load(tmp_path)
    assert again == plan
    jax.tree.map(np.testing.assert_array_equal, arrays, adapters)


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        ("loha", {"r": 3}, StructureError, r"conv1.hada_w1_b has shape \(2, 27\).*needs \(3, 27\)"),
        ("loha", {"use_effective_conv2d": True}, StructureError, "no 'base.*conv1.hada_t1"),
        ("loha", {"lora_alpha": 3}, FormatError, "lora_alpha=3 is not supported; nearest known"),
        ("loha", {"bias": "all"}, FormatError, "bias='all' is not one of none"),
        ("loha", {"r": "2"}, FormatError, "r='2' is not a number"),
        ("loha", {"peft_type": "LOKR"}, StructureError, "lokr_w1"),
        ("lokr", {"decompose_factor": 1.5}, FormatError, "decompose_factor=1.5 is not a whole"),
        ("lokr", {"decompose_factor": 0}, PlanError, "decompose_factor=0 must be -1"),
        ("lokr", {"decompose_factor": 3}, StructureError, "lokr_w1 has shape"),
        ("lokr", {"decompose_both": True}, StructureError, "head.lokr_w1_a"),
        ("lokr", {"rank_pattern": {"conv2": 1}}, StructureError, "conv2.lokr_w2_a"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, case, changes, error, message):
    folder_of(tmp_path, RULES[case])
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message) as found:
        load(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("change", ["missing", "extra", "misshaped"])
def test_tensors_that_do_not_fit(tmp_path, change):
    folder_of(tmp_path, RULES["lokr"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: np.array(array) for name, array in TensorFiles(file).items()}
    key = "base_model.model.conv2.lokr_w2"
    edits = {
        "missing": lambda: tensors.pop(key),
        "extra": lambda: tensors.update({f"{key}_a": tensors[key]}),
        "misshaped": lambda: tensors.update({key: tensors[key].swapaxes(0, 1).copy()}),
    }
    edits[change]()
    save_one(file, tensors)
    with pytest.raises(StructureError, match=r"conv2\.lokr_w2"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"line/kernel": flora.LoKr(rank=8)}, "line/kernel: PEFT's LoKr of a 1-D convolution"),
        ({"conv1/kernel": flora.LoHa(rank=2), "conv1/bias": flora.Replace()}, "trains no biases"),
        (
            {
                "conv1/kernel": flora.LoHa(rank=2),
                "conv2/kernel": flora.LoHa(rank=2, effective_conv=True),
            },
            "one use_effective_conv2d",
        ),
        (
            {"conv1/kernel": flora.LoKr(rank=1), "head/kernel": flora.LoKr(decompose_factor=2)},
            "one decompose_factor",
        ),
        ({"conv1/kernel": flora.LoHa(), "head/kernel": flora.LoKr()}, "of one method"),
    ],
)
def test_plans_without_a_peft_form(tmp_path, rules, message):
    with pytest.raises(PlanError, match=message):
        folder_of(tmp_path / "new", rules)
    assert not (tmp_path / "new").exists()


STACKED = {"layers": {"q": {"kernel": jnp.ones((2, 4, 6))}}}
STACK_NAMES = NameMap(rules=(Rule(r"layers/(.+)/kernel", r"m.layers.{layer}.\1.weight", OUT_IN),))


def test_layers_whose_factors_differ_in_kind(tmp_path):
    plan = flora.plan(STACKED, {".*": flora.LoKr(rank=1)})
    adapters = jax.tree.map(lambda x: x + 1, flora.init(plan, jax.random.key(0), STACKED))
    io.save_peft(tmp_path, adapters, plan, STACKED, STACK_NAMES)
    edit_config(tmp_path, rank_pattern={"1.q": 2})
    file = tmp_path / "adapter_model.safetensors"
    tensors = {n: np.array(a) for n, a in TensorFiles(file).items() if "1.q.lokr_w2" not in n}
    tensors["base_model.model.m.layers.1.q.lokr_w2"] = np.ones((3, 2), np.float32)
    save_one(file, tensors)
    with pytest.raises(PlanError, match=r"layers/q/kernel: ranks \[1, 2\] .* unrolled"):
        io.load_peft(tmp_path, STACKED, STACK_NAMES)


# Against PEFT -----------------------------------------------------------------------------------
def libraries():
    return pytest.importorskip("torch"), pytest.importorskip("peft")


def net_of(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv1 = torch.nn.Conv2d(3, 6, 3, padding=1)
            self.conv2 = torch.nn.Conv2d(6, 8, (3, 2), stride=2)
            self.line = torch.nn.Conv1d(8, 6, 3)
            self.head = torch.nn.Linear(6, 12)

        def forward(self, x):
            x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
            return self.head(torch.tanh(self.line(x.flatten(2))).mean(2))

    net = Net()
    tensors = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    return net, {
        name: {
            "kernel": jnp.asarray(tensors[f"{name}.weight"].transpose(AXES[name])),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }
        for name in SHAPES
    }


ALL = ["conv1", "conv2", "line", "head"]
CASES = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, "rank_pattern": {"head": 3}}),
    "loha-effective": (
        "LoHaConfig",
        {"r": 2, "use_effective_conv2d": True, "alpha_pattern": {"conv2": 1}},
    ),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 2, "rank_pattern": {"head": 2}, "rank_dropout": 0.1}),
    "lokr-full": ("LoKrConfig", {"r": 4, "target_modules": ["conv1", "conv2", "head"]}),
    # Without the 1-D convolution, on which PEFT's own forward fails (torch.kron, view size).
    "lokr-effective": (
        "LoKrConfig",
        {
            "r": 1,
            "use_effective_conv2d": True,
            "decompose_both": True,
            "init_weights": "lycoris",
            "target_modules": ["conv1", "conv2", "head"],
        },
    ),
    "lokr-factor": ("LoKrConfig", {"r": 1, "decompose_factor": 2, "decompose_both": True}),
}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_convolutions(tmp_path, case):
    torch, peft = libraries()
    net, params = net_of(torch)
    images = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    base = net(images).detach().numpy()
    np.testing.assert_allclose(ours(params, IMAGES), base, atol=1e-5)
    cls, options = CASES[case]
    theirs = peft.get_peft_model(net, getattr(peft, cls)(**{"target_modules": ALL, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.5 * torch.randn_like(p))
    expected = theirs.eval()(images).detach().numpy()
    assert np.abs(expected - base).max() > 0.01
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = io.load_peft(tmp_path / "a", params, NAMES, specs=SPECS)
    assert plan.count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    out = jax.jit(lambda a: ours(flora.bind(params, a, plan), IMAGES))(adapters)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    io.save_peft(tmp_path / "b", adapters, plan, params, NAMES)
    again = peft.PeftModel.from_pretrained(net_of(torch)[0], tmp_path / "b").eval()
    np.testing.assert_allclose(again(images).detach().numpy(), expected, atol=1e-5)
    one, two = (TensorFiles(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert set(one) == set(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.interop
def test_factorization_is_pefts():
    libraries()
    from peft.tuners.lokr.layer import factorization as theirs

    for n in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 6, 10, 16):
            assert factorization(n, factor) == theirs(n, factor), (n, factor)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_peft_scrambles_a_full_factor_of_a_one_dimensional_convolution(tmp_path):
    """Why that form is refused: what PEFT computes there is not the Kronecker product."""
    torch, peft = libraries()
    net, params = net_of(torch)
    theirs = peft.get_peft_model(net, peft.LoKrConfig(r=4, alpha=4, target_modules=["line"]))
    layer = theirs.base_model.model.line
    with torch.no_grad():
        layer.lokr_w1["default"].normal_()
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    kron = torch.stack([torch.kron(w1, w2[..., k]) for k in range(3)], dim=-1)
    change = layer.get_delta_weight("default")
    assert change.shape == kron.shape and not torch.allclose(change, kron, atol=1e-2)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="line/kernel: PEFT's LoKr of a 1-D convolution"):
        io.load_peft(tmp_path, params, NAMES, specs=SPECS)
