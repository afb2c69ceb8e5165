# Faster R-CNN, ResNet-50 FPN, COCO, 1x schedule, as a LazyConfig: our parts built with plain arguments, no CfgNode.
# Run:  python tools/lazyconfig_train_net.py --num-gpus 8 --config-file configs/lazy/faster_rcnn_fpn_R_50.py
#       (tools/ of a Detectron2 checkout)
# Twin: COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml here; the same model with the same weights.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from fpn_d2.modeling import FPN, PyramidROIPooler

# Detectron2's RPN, RoI heads and schedule, without the mask branch.
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)

# Ours: the backbone ...
model.backbone = L(FPN)(
    bottom_up=model.backbone.bottom_up,
    in_features=["res2", "res3", "res4", "res5"],
    out_channels=256,
    norm="",
    upsample="nearest",
    fuse_type="sum",
    top_block="maxpool",
)
# ... and the pooler with its level assignment (assigner=... takes another rule).
model.roi_heads.box_pooler = L(PyramidROIPooler)(
    output_size=7,
    scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
    sampling_ratio=0,
    pooler_type="ROIAlignV2",
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
