"""Times of the packed linear and of the rotation: `python benchmarks/kernels.py --help`, code in packed_linear/."""

if __name__ == "__main__":
    # not above: transformers imports any module named `kernels`, and beside a running script it finds this one
    from benchmarks.packed_linear.cli import app

    app()
