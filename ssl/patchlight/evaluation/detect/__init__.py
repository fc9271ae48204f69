"""Object detection and instance segmentation as on COCO: Mask R-CNN and Cascade Mask R-CNN on a pretrained backbone."""
