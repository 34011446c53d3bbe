# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxunlearn` is the console script `jaxunlearn`."""

from jaxunlearn.commands import main

if __name__ == "__main__":
    main()
