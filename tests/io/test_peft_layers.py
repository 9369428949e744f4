"""HF-PEFT on convolutions, GPT-2's transposed Linear and torch's generator, on hand-made models."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.core import ops
from flora_jax.core.errors import FloraError
from flora_jax.io.names import OIHW, OUT_IN, NameMap, Rule
from flora_jax.io.peft_methods import torch_uniform

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

NAMES = NameMap(
    rules=(
        Rule("(conv.)/kernel", r"\1.weight", OIHW),
        Rule("(conv.)/bias", r"\1.bias"),
        Rule("head/kernel", "head.weight", OUT_IN),
        Rule("head/bias", "head.bias"),
    )
)
IMAGES = np.random.default_rng(0).standard_normal((2, 7, 7, 3)).astype(np.float32)


class Net(torch.nn.Module):
    """Two convolutions (one strided) and a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(6, 5, (3, 2), stride=2)
        self.head = torch.nn.Linear(5, 4)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def ours(params, x):
    conv1, conv2, head = (params[name] for name in ("conv1", "conv2", "head"))
    x = ops.conv(x, conv1["kernel"], padding=((1, 1), (1, 1))) + conv1["bias"]
    x = ops.conv(jnp.maximum(x, 0), conv2["kernel"], strides=2, padding="VALID") + conv2["bias"]
    return ops.dot(jnp.maximum(x, 0).mean((1, 2)), head["kernel"]) + head["bias"]


def ours_of(net):
    tensors = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    leaf = lambda n, axes: {
        "kernel": jnp.asarray(tensors[f"{n}.weight"].transpose(axes)),
        "bias": jnp.asarray(tensors[f"{n}.bias"]),
    }
    axes = {"conv1": OIHW, "conv2": OIHW, "head": OUT_IN}
    return {name: leaf(name, order) for name, order in axes.items()}


def noisy(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).numpy()


CONV = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["conv1", "conv2", "head"]),
    "lora-bias": lambda: peft.LoraConfig(r=2, target_modules=["conv1"], lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], use_dora=True),
    "ia3-output": lambda: peft.IA3Config(target_modules=["conv2", "head"], feedforward_modules=[]),
    "ia3-input": lambda: peft.IA3Config(target_modules=["conv2"], feedforward_modules=["conv2"]),
}


@pytest.mark.parametrize("case", CONV)
def test_convolutions(tmp_path, case):
    net = Net()
    params = ours_of(net)
    np.testing.assert_allclose(ours(params, IMAGES), run(net), atol=1e-5)
    theirs = noisy(peft.get_peft_model(net, CONV[case]()))
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = io.load_peft(tmp_path / "a", params, NAMES)
    out = ours(flora.bind(params, adapters, plan), IMAGES)
    np.testing.assert_allclose(out, run(theirs), atol=1e-4)
    io.save_peft(tmp_path / "b", adapters, plan, params, NAMES)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "b").eval()
    np.testing.assert_allclose(run(again), run(theirs), atol=1e-5)
    one, two = (io_tensors(tmp_path / d) for d in "ab")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("modules", "options"),
    [
        (["conv1", "head"], {"oft_block_size": 9}),
        (["conv1"], {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False}),
    ],
)
def test_rotated_patches(tmp_path, modules, options):
    """Against PEFT's merged weight: on a 3x3 window its unmerged forward differs from that."""
    config = peft.OFTConfig(target_modules=modules, **options)
    theirs = noisy(peft.get_peft_model(Net(), config))
    theirs.save_pretrained(tmp_path / "a")
    unmerged = run(theirs)
    theirs.merge_adapter()
    params = ours_of(Net())
    plan, adapters = io.load_peft(tmp_path / "a", params, NAMES)
    out = ours(flora.bind(params, adapters, plan), IMAGES)
    np.testing.assert_allclose(out, run(theirs), atol=1e-4)
    assert np.abs(unmerged - run(theirs)).max() > 1e-3, "PEFT agrees with itself now"
    io.save_peft(tmp_path / "b", adapters, plan, params, NAMES)
    one, two = (io_tensors(tmp_path / d) for d in "ab")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "b").eval()
    again.merge_adapter()
    np.testing.assert_allclose(run(again), run(theirs), atol=1e-5)


def test_a_window_that_is_not_square_is_refused(tmp_path):
    params = ours_of(Net())
    plan = flora.plan(params, {"conv2/kernel": flora.OFT(block_size=6)})
    adapters = flora.init(plan, jax.random.key(0), params)
    with pytest.raises(FloraError, match=r"conv2/kernel: PEFT's OFT takes square 2-D windows"):
        io.save_peft(tmp_path, adapters, plan, params, NAMES)


def io_tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_grouped_convolution_is_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    names = NameMap(rules=(Rule("(0)/kernel", r"\1.weight", OIHW), Rule("(0)/bias", r"\1.bias")))
    params = {"0": {"kernel": jnp.zeros((3, 3, 2, 8)), "bias": jnp.zeros(8)}}
    specs = {"0/kernel": flora.KernelSpec.conv(groups=2)}
    with pytest.raises(FloraError, match="2 groups"):
        io.load_peft(tmp_path, params, names, specs=specs)


def test_transposed_linear(tmp_path):
    """GPT-2's Conv1D stores ``[in, out]``; PEFT's factors look as for a Linear."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential()
    net, weight = make(), torch.randn(6, 9)
    net.add_module("c_attn", Conv1D(9, 6))
    net.c_attn.weight.data = weight.clone()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    theirs = noisy(peft.get_peft_model(net, config))
    theirs.save_pretrained(tmp_path / "a")
    names = NameMap(rules=(Rule("c_attn/kernel", "c_attn.weight"), Rule("(.+)/bias", r"\1.bias")))
    params = {"c_attn": {"kernel": jnp.asarray(weight.numpy()), "bias": jnp.zeros(9)}}
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    plan, adapters = io.load_peft(tmp_path / "a", params, names)
    out = ops.dot(x, flora.bind(params, adapters, plan)["c_attn"]["kernel"])
    expected = theirs(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    io.save_peft(tmp_path / "b", adapters, plan, params, names)
    base = make()
    base.add_module("c_attn", Conv1D(9, 6))
    base.c_attn.weight.data = weight.clone()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "b").eval()
    assert again.peft_config["default"].fan_in_fan_out is True
    np.testing.assert_allclose(again(torch.tensor(x)).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1234567])
def test_torch_generator(seed):
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(seed)
    ours = np.random.RandomState(seed)
    for shape, fan_in in (((4, 48), 48), ((33, 4), 4)):
        bound = np.sqrt(3.0) * np.sqrt(2.0) / np.sqrt(fan_in)
        theirs = torch.empty(shape).uniform_(-bound, bound, generator=draws).numpy()
        np.testing.assert_allclose(torch_uniform(ours, shape, fan_in), theirs, rtol=0, atol=1e-7)


def test_vera_without_its_projections(tmp_path):
    """The file holds only d and b: A and B come from the seed."""

    def make():
        torch.manual_seed(0)
        names = {"one": torch.nn.Linear(6, 9), "two": torch.nn.Linear(9, 4)}
        return torch.nn.Sequential(OrderedDict(names))

    net = make()
    params = {
        name: {
            "kernel": jnp.asarray(layer.weight.detach().numpy().T),
            "bias": jnp.asarray(layer.bias.detach().numpy()),
        }
        for name, layer in net.named_children()
    }
    config = peft.VeraConfig(
        r=3, target_modules=["one", "two"], save_projection=False, projection_prng_key=7
    )
    theirs = noisy(peft.get_peft_model(net, config))
    theirs.save_pretrained(tmp_path)
    assert not any("vera_A" in key for key in io_tensors(tmp_path))
    names = NameMap(
        rules=(Rule("(.+)/kernel", r"\1.weight", OUT_IN), Rule("(.+)/bias", r"\1.bias"))
    )
    plan, adapters = io.load_peft(tmp_path, params, names)
    bound = flora.bind(params, adapters, plan)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    y = ops.dot(x, bound["one"]["kernel"]) + bound["one"]["bias"]
    y = ops.dot(y, bound["two"]["kernel"]) + bound["two"]["bias"]
    np.testing.assert_allclose(y, theirs(torch.tensor(x)).detach().numpy(), atol=1e-5)
