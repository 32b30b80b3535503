"""Token models as timm citizens: `timm.create_model("mtm_vit_base", ...)` works after importing this package."""

from seitpp.models.mtm import MTM, MaskPlan, ModelError, load_mtm
from seitpp.models.vit import TokenEmbed

__all__ = ["MTM", "MaskPlan", "ModelError", "TokenEmbed", "load_mtm"]
