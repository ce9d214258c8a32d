//! meshlb: one object declares a service, every node serves it from the kernel.
