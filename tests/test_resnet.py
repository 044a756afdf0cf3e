"""ResNet: its blocks against torch's own layers, what is frozen, and the published image backbone."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bevfn import tree
from bevfn.backbones import resnet
from bevfn.parity import golden
from bevfn.training import optim

IMAGE = resnet.Config(channels=4, blocks=(2, 1, 1), strides=(1, 2, 2))
BEV = resnet.Config(channels_in=6, channels=4, blocks=(1, 2), strides=(1, 2), bottleneck=False, pool=False)
GOLDEN = Path(__file__).parents[2] / "shared" / "goldens" / "bevdepth_r50_2key"


def init(config: resnet.Config) -> tuple[dict, dict]:
    """As `resnet.init`, but with norms that do something."""
    generator = torch.Generator().manual_seed(0)
    params, state = resnet.init(config, generator)

    def moved(leaf: Tensor) -> Tensor:
        return leaf + torch.rand(leaf.shape, generator=generator) * (leaf.dim() == 1)

    return tree.map(moved, params), tree.map(moved, state)


class Layer(nn.Sequential):
    def __init__(self, params: dict, state: dict, stride: int) -> None:
        (c_out, c_in, k, _) = params["conv"]["weight"].shape
        super().__init__(nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False), nn.BatchNorm2d(c_out))
        self[0].weight.data = params["conv"]["weight"].clone()
        self[1].weight.data, self[1].bias.data = (params["norm"][k].clone() for k in ("weight", "bias"))
        self[1].running_mean, self[1].running_var = (state["norm"][k].clone() for k in ("mean", "var"))


def by_modules(params: dict, state: dict, x: Tensor, config: resnet.Config, train: bool) -> tuple[list[Tensor], list]:
    """The maps, and every norm's running variance afterwards in the order of the leaves, from torch's modules."""
    made: list[Layer] = []

    def run(params: dict, state: dict, x: Tensor, stride: int) -> Tensor:
        made.append(Layer(params, state, stride).train(train))
        return made[-1](x)

    def block(params: dict, state: dict, x: Tensor, stride: int) -> Tensor:
        p, s = params["layers"], state["layers"]
        strides = (1, stride, 1) if config.bottleneck else (stride, 1)
        y = x
        for i, by in enumerate(strides):
            y = run(p[i], s[i], y, by)
            y = y.relu() if i + 1 < len(strides) else y
        return F.relu(y + (run(params["shortcut"], state["shortcut"], x, stride) if "shortcut" in params else x))

    x = run(params["stem"], state["stem"], x, 2).relu()
    maps = [F.max_pool2d(x, 3, 2, 1) if config.pool else x]
    for blocks, states, stride in zip(params["stages"], state["stages"], config.strides):
        x = maps[-1]
        for i, (p, s) in enumerate(zip(blocks, states)):
            x = block(p, s, x, stride if i == 0 else 1)
        maps.append(x)
    return maps, [layer[1].running_var for layer in made]


@pytest.mark.parametrize("config", [IMAGE, BEV], ids=["bottlenecks", "basic"])
@pytest.mark.parametrize("train", [False, True])
def test_equals_torchs_layers(config, train):
    params, state = init(config)
    x = torch.randn(3, config.channels_in, 64, 48, generator=torch.Generator().manual_seed(1))
    maps, new = resnet.apply(params, state, x, config=config, train=train)
    wanted, variances = by_modules(params, state, x, config, train)
    assert [m.shape[1] for m in maps] == [config.channels, *config.stage_channels]
    for a, b in zip(maps, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    found = [leaf for name, leaf in tree.flatten(new).items() if name.endswith("var")]
    for a, b in zip(found, variances, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    kept = all(torch.equal(a, b) for a, b in zip(tree.leaves(new), tree.leaves(state)))
    assert kept != train


def test_starts_as_its_shortcuts():
    params, state = resnet.init(IMAGE, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps, _ = resnet.apply(params, state, x, config=IMAGE, train=True)
    first = params["stages"][0][0]["shortcut"]
    shortcut = F.batch_norm(
        F.conv2d(maps[0], first["conv"]["weight"]), torch.zeros(16), torch.ones(16), training=True
    ).relu()
    torch.testing.assert_close(maps[1], shortcut, rtol=1e-4, atol=1e-5)
    again, _ = resnet.init(IMAGE, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(again)))


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_stages_neither_learn_nor_count(frozen):
    config = resnet.Config(channels=4, blocks=(2, 1, 1), strides=(1, 2, 2), frozen_stages=frozen)
    params, state = init(config)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def loss(params: dict) -> tuple[Tensor, dict]:
        maps, new = resnet.apply(params, state, x, config=config, train=True)
        return sum(m.square().sum() for m in maps), new

    grads, new = torch.func.grad(loss, has_aux=True)(params)
    groups = tuple(optim.Group("camera." + pattern, frozen=True) for pattern in config.frozen)
    learning = optim.layout(optim.Config(optim.Schedule(1e-3), groups=groups), {"camera": params}).names
    for name, grad in tree.flatten(grads).items():
        parts = name.split(".")
        held = frozen >= 0 if parts[0] == "stem" else int(parts[1]) < frozen
        assert bool(grad.any()) != held, name
        assert ("camera." + name in learning) != held, name
    old = tree.flatten(state)
    for name, leaf in tree.flatten(new).items():
        parts = name.split(".")
        held = frozen >= 0 if parts[0] == "stem" else int(parts[1]) < frozen
        assert torch.equal(leaf, old[name]) == held, name


def test_half_precision_follows_its_input():
    params, state = init(BEV)
    x = torch.randn(1, 6, 32, 32, generator=torch.Generator().manual_seed(1))
    wide, _ = resnet.apply(params, state, x, config=BEV, train=False)
    maps, _ = resnet.apply(params, state, x.half(), config=BEV, train=False)
    for a, b in zip(maps, wide):
        assert a.dtype == torch.float16 and float((a - b).norm() / b.norm()) < 3e-3


def test_a_basic_block_stands_alone():
    params, state = resnet.init_basic(5, 7, generator=torch.Generator().manual_seed(0), stride=2)
    x = torch.randn(2, 5, 8, 6)
    y, new = resnet.apply_block(params, state, x, train=True, stride=2)
    assert y.shape == (2, 7, 4, 3) and not bool((y < 0).any())
    assert tree.flatten(new).keys() == tree.flatten(state).keys() and "shortcut" in params
    assert float(params["layers"][1]["norm"]["weight"].min()) == 1.0  # learns from the first step: torch's defaults
    same, _ = resnet.init_basic(5, 5, generator=torch.Generator().manual_seed(0))
    assert "shortcut" not in same


@pytest.mark.parametrize(
    "change, message",
    [({"strides": (1, 2)}, "must name the same stages"), ({"frozen_stages": 5}, "frozen_stages 5 must be -1 to 4")],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        resnet.Config(**change)


def published_name(path: str, prefix: str) -> str:
    """The checkpoint's key of one of our leaves."""
    parts = path.split(".")
    leaf = {"mean": "running_mean", "var": "running_var"}.get(parts[-1], parts[-1])
    kind, layer, block = parts[-2], "", ""
    if parts[0] == "stages":
        block = f"layer{int(parts[1]) + 1}.{parts[2]}."
        if parts[3] == "shortcut":
            return f"{prefix}{block}downsample.{0 if kind == 'conv' else 1}.{leaf}"
        layer = str(int(parts[4]) + 1)
    return f"{prefix}{block}{'conv' if kind == 'conv' else 'bn'}{layer or 1}.{leaf}"


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/goldens")
def test_the_published_image_backbone():
    config = resnet.Config(frozen_stages=0)
    params, state = resnet.init(config, torch.Generator().manual_seed(0))
    weights, used = golden.read_manifest(GOLDEN)["weights"], set()

    def fill(values: dict) -> dict:
        found = {}
        for path in tree.flatten(values):
            key = published_name(path, "model.backbone.img_backbone.")
            found[path] = torch.from_numpy(golden.draw(key, weights[key], 0))
            used.add(key)
        return tree.unflatten(found, values)

    params, state = fill(params), fill(state)
    counters = {k for k in weights if "img_backbone" in k and k.endswith("num_batches_tracked")}
    assert used | counters == {k for k in weights if "img_backbone" in k}  # every key has a leaf
    images = load_file(GOLDEN / "inputs.safetensors")["imgs_u8_rgb"][:2].flip(-1).float()  # B, G, R: the recipe's quirk
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = ((images - mean) / std).permute(0, 3, 1, 2).contiguous()
    maps, _ = resnet.apply(params, state, x, config=config, train=False)
    outputs = load_file(GOLDEN / "outputs.safetensors")
    slices = json.loads((GOLDEN / "stats.json").read_text())["slices"]
    for name, ours in zip(("stem", "stage1", "stage2", "stage3", "stage4"), maps, strict=True):
        key = f"eval/img_{name}_key"
        steps = [int(part.split(":")[-1] or 1) for part in slices[key].strip("[]").split(",")]
        mine = ours[tuple(slice(None, None, step) for step in steps)]
        theirs = outputs[key][: len(mine)]
        assert mine.shape == theirs.shape and float((mine - theirs).norm() / theirs.norm()) < 3e-6, name
