# SPDX-License-Identifier: Apache-2.0
"""`python -m experiments.quickstart` runs the quickstart."""

from experiments.quickstart import run

if __name__ == "__main__":
    run.main()
