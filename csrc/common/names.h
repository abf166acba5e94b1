// Names of objects that exist once for each instruction set.
#pragma once

#define MMK_JOIN_OF(a, b) a##b
#define MMK_JOIN(a, b) MMK_JOIN_OF(a, b)
