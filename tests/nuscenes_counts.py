"""How much of nuScenes' trainval the published recipes train on: counts of a data set that is not here, in one place."""

KEY_FRAMES = 28_130  # of train: 700 scenes
BALANCED = 123_580  # samples that mmdetection3d's CBGS makes of them; its logs, and 3,862 batches of 32 an epoch
BATCH = 32  # BEVFusion's: 8 devices x 4
STEPS = -(-BALANCED // BATCH)  # 3,862, the last batch filled up
