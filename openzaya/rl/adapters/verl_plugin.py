"""What verl imports (entry point group ``verl.plugins``, or VERL_USE_EXTERNAL_MODULES): importing it registers.

A module of its own, because verl only imports a plugin, and one that was imported before would register nothing.
"""

from __future__ import annotations

import logging

from openzaya.rl.adapters.verl import register

try:
    register()
except Exception as error:
    # verl drops the exception without a word, and fails much later on a name that it does not know.
    logging.getLogger(__name__).error("OpenZAYA's advantages and losses are not registered in verl: %s", error)
    raise
