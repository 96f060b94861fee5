"""Pictures → pixel arrays and prompt pieces; boxes from answers. Needs Pillow (extra `vision`)."""
