"""The recipe for data of one's own: published networks at published sizes, others as flags say, and numbers that do not fit."""

from dataclasses import replace

import pytest
import small_t4_world
import small_world
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bevfn import recipes, tree
from bevfn.backbones import sparse_encoder
from bevfn.commands import lowering
from bevfn.data import source
from bevfn.data.reading import CLASS_NAMES
from bevfn.experiments import bevfusion, bevfusion_lidar, custom
from bevfn.models import bevfusion as family
from bevfn.training import tasks


@pytest.mark.parametrize("model", custom.NETWORKS)
def test_at_the_published_sizes_the_networks_are_the_published_ones(model):
    config = replace(custom.DEFAULTS[model]["own"], classes=CLASS_NAMES)
    assert custom.network(config) == custom.NETWORKS[model]()


def test_recipes_are_bevfusions_but_for_the_quirks():
    assert custom.preset() == custom.DEFAULTS
    for model, theirs in (
        ("custom-lidar", bevfusion_lidar.DEFAULTS["bevfusion-lidar"]),
        ("custom-lidar-camera", bevfusion.DEFAULTS["bevfusion-lidar-camera"]),
    ):
        ours, published = custom.DEFAULTS[model]["own"], theirs["nuscenes"]
        for name in (
            "epochs",
            "batch_size",
            "recipe_batch",
            "recipe_lr",
            "schedule",
            "final_lr",
            "lr_turn",
            "weight_decay",
        ):
            assert getattr(ours, name) == getattr(published, name), (model, name)


@pytest.mark.parametrize("model", custom.NETWORKS)
def test_a_network_of_ones_own_range_voxels_and_images_fits_together(model):
    """Shapes of another height, of a range that is no square, and of voxels that are none."""
    config = replace(
        custom.DEFAULTS[model]["own"], classes=("car", "person", "cone"), small_classes=("person",), image_size=(96, 320),
        bounds_m=(-12.8, -25.6, -2.0, 51.2, 25.6, 4.4), voxel_m=(0.1, 0.2, 0.1),
    )  # fmt: skip
    made = custom.network(config)
    assert made.head.cells == (80, 32) and made.voxels.grid == (640, 256, 64) and made.head.small_classes == (1,)
    if made.camera is not None:
        grid = made.camera.view.grid
        assert (grid.cells, grid.image_size) == ((160, 64), (96, 320)) and grid.depth_m == (1.0, 58.0, 0.5)
    if model == "custom-lidar":
        levels = sparse_encoder.output_grid(made.lidar.encoder, made.sparse_grid)[2]
        assert made.backbone.channels_in == made.lidar.encoder.channels_out * levels > 256
    usual = replace(config, bounds_m=custom.Config().bounds_m, voxel_m=custom.Config().voxel_m)
    with FakeTensorMode():  # of the small network, whose layers of height and depth follow likewise
        ours, theirs = (tree.flatten(family.init(family.mini(custom.network(one)), 0)[0]) for one in (config, usual))
    differing = [name for name in ours if ours[name].shape != theirs[name].shape]
    assert all(name.startswith(("fuser", "bev.backbone", "camera.view.depth_net")) for name in differing), differing


@pytest.mark.parametrize(
    ("root", "kind"), [(small_t4_world.root, "t4"), (lambda: small_world.index().root, "nuscenes")]
)
def test_it_reads_data_of_every_kind_with_the_classes_and_cameras_that_are_there(root, kind):
    assert source.kind(root()) == kind
    config = replace(custom.DEFAULTS["custom-lidar-camera"][kind], data_root=root(), scale="mini").completed()
    assert config.cameras and config.classes == source.open(root()).training.class_names
    tasks.check(custom.task(config))
    assert config.completed() == config
    chosen = replace(config, classes=("bus", "car"), small_classes=(), cameras=("CAM_BACK",))
    task = custom.task(chosen)
    assert task.data.eval_reading.class_names == ("bus", "car") and task.data.eval_reading.channels == ("CAM_BACK",)
    with pytest.raises(ValueError, match="does not annotate tram, which the model detects; it annotates"):
        tasks.check(custom.task(replace(chosen, classes=("tram",))))
    with pytest.raises(ValueError, match="has no camera front, which the model reads; it has CAM_FRONT"):
        tasks.check(custom.task(replace(chosen, cameras=("front",))))


def test_its_steps_are_made_for_lowering_with_the_classes_of_a_generated_frame():
    config = replace(recipes.defaults("custom", "custom-lidar-camera")["synthetic"].plain(), batch_size=1)
    made = lowering.steps("custom", config)
    batch = made["train"][1][1]
    assert batch.images.shape[2] == 6 and made["inference"][1][2] is batch


def test_what_of_a_checkpoint_of_other_classes_fits_is_taken():
    with FakeTensorMode():
        ours, theirs = (
            family.init(family.mini(custom.network(replace(custom.Config(), classes=names))), seed=0)
            for names in (("a", "b"), CLASS_NAMES)
        )
    differing = [n for n, leaf in tree.flatten(ours[0]).items() if leaf.shape != tree.flatten(theirs[0])[n].shape]
    assert differing and all(name.startswith("head") for name in differing)
    task = custom.task(
        replace(custom.DEFAULTS["custom-lidar"]["nuscenes"], data_root=small_world.index().root, classes=("car",))
    )
    assert task.start.merge.__name__ == "begin"


WRONG = {
    "no multiple": (
        {"bounds_m": (-54.0, -54.0, -5.0, 53.0, 54.0, 3.0)},
        r"--bounds-m and --voxel-m: 107 m in x are 1426.67 voxels of 0.075 m, which must be a multiple of 8; let it end at 52.8 m",
    ),
    "no whole voxels": ({"voxel_m": (0.075, 0.075, 0.3)}, r"8 m in z are 26.6667 voxels of 0.3 m, which must be a whole number"),
    "backwards": ({"bounds_m": (54.0, -54.0, -5.0, -54.0, 54.0, 3.0)}, "--bounds-m goes from 54 to -54 m in x"),
    "images": ({"image_size": (100, 200)}, r"--image-size 100 200 must be multiples of 32, such as 96 192"),
    "a class twice": ({"classes": ("car", "car")}, "has a name twice"),
    "a small class of none": ({"classes": ("car",), "small_classes": ("person",)}, "--small-classes has person, which is none"),
    "a voxel of nothing": ({"voxel_m": (0.0, 0.1, 0.1)}, "--voxel-m 0 must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_do_not_fit_are_refused_with_those_that_would(name):
    changes, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        custom.Config(**changes)


def test_a_range_too_low_for_the_encoder_is_refused():
    flat = replace(custom.Config(), classes=("car",), bounds_m=(-54.0, -54.0, 0.0, 54.0, 54.0, 1.0))
    with pytest.raises(ValueError, match="make 5 voxels in z, which the encoder halves four times to nothing"):
        custom.network(flat)


def test_what_is_suggested_fits():
    for end in torch.linspace(40.0, 60.0, 23).tolist():
        bounds = (-54.0, -54.0, -5.0, end, 54.0, 3.0)
        try:
            custom.check_grid(bounds, (0.075, 0.075, 0.2))
        except ValueError as error:
            fitting = float(str(error).partition("end at ")[2].partition(" m")[0])
            custom.check_grid((*bounds[:3], fitting, *bounds[4:]), (0.075, 0.075, 0.2))
