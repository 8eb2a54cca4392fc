"""The constructors and numbers of other libraries' losses, computed by this package's one pass.

`softdice.compat.monai`, `softdice.compat.nnunet` and `softdice.compat.smp` have the classes of those libraries under
their names: change the import, keep the script. None of them imports the library that it stands in for.
"""
