"""The demo: a year of real purchases with real coupon redemptions as delayed feedback."""
