"""`python -m bq_calibration` and `torchrun -m bq_calibration` are `bq-calibrate`."""

from .cli import calibrate_main

calibrate_main()
