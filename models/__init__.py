# SPDX-License-Identifier: Apache-2.0
"""Model families, one file each. Not part of the installed library, which never imports them."""
