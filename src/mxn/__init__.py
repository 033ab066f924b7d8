"""mxn: the bus between M models and N chips.

Importing this package loads no torch; heavy parts are imported where they are used.
"""

__version__ = "0.1.0"
