"""How a model's samples are read, from its config alone."""

from dataclasses import replace

import pytest

from bevfn.data import reading
from bevfn.data.batch import Base
from bevfn.models import bevdepth, bevfusion, bevnext


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (bevfusion, bevfusion.lidar_camera()),
        (bevfusion, bevfusion.lidar_only()),
        (bevfusion, bevfusion.camera_only()),
        (bevdepth, bevdepth.key_frames(2)),
        (bevnext, bevnext.stage_one()),
    ],
)
def test_a_models_config_says_how_its_samples_are_read(family, config):
    needs = family.needs(config)
    how = reading.for_model(needs)
    needs.check(how, train=True)
    assert not how.random and how.base is needs.base and how.range == needs.range
    assert (how.points is not None) == needs.points and (how.cameras is not None) == (needs.image_size is not None)


def test_bevfusions_range_and_image_size_are_the_configs():
    config = bevfusion.mini(bevfusion.lidar_camera())
    config = replace(config, voxels=replace(config.voxels, lower=(-54.0, -54.0, -4.0)))
    how = reading.for_model(bevfusion.needs(config))
    assert how.range == (-54.0, -54.0, -4.0, 54.0, 54.0, 3.0) and how.base is Base.LIDAR
    assert how.cameras.image_size == (64, 192) and how.points.sweeps == 0


def test_what_does_not_fit_is_one_sentence_with_both_sides():
    needs = bevfusion.needs(bevfusion.lidar_camera())
    with pytest.raises(ValueError, match="does not fit BEVFusion: it gives 2 classes, not 10"):
        reading.for_model(needs, class_names=("car", "person"))
    with pytest.raises(ValueError, match="it gives images of 64 x 176 pixels, not 256 x 704"):
        reading.for_model(needs, cameras=reading.Cameras(image_size=(64, 176)))
