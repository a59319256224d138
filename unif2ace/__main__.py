"""`python -m unif2ace` is the command `unif2ace`."""

from unif2ace.cli import main

raise SystemExit(main())
