"""The columns of photometric's table, in the order in which the kernels read them."""

from __future__ import annotations

from itertools import permutations
from types import MappingProxyType

PHOTOMETRIC_COLUMNS = MappingProxyType(  # column -> the value that changes nothing
    {
        "brightness": 1.0,  # factor, 0..MAX_FACTOR
        "contrast": 1.0,  # factor around the mean gray of the picture at that step, 0..MAX_FACTOR
        "saturation": 1.0,  # factor around each pixel's gray, 0..MAX_FACTOR
        "hue": 0.0,  # part of the color circle, -0.5..0.5
        "order": 0.0,  # row of JITTER_ORDERS: which of the four above comes first, second, third, last
        "gray": 0.0,  # above 0: all channels become the gray
        "sigma": 0.0,  # above 0: Gaussian blur, in pixels
        "solarize": 256.0,  # values from here on become 255 minus themselves
    }
)
JITTER_ORDERS = tuple(permutations(range(4)))  # of brightness, contrast, saturation, hue
MAX_FACTOR = 1024.0  # a factor or hue outside its range, or a NaN, changes nothing
MAX_HUE = 0.5
MAX_REACH = 12  # pixels to each side that the blur reads: three sigmas up to sigma 4
GRAY = (0.2989, 0.587, 0.114)  # weights of red, green and blue, torchvision's
