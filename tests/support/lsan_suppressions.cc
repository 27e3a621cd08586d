// SPDX-License-Identifier: Apache-2.0
// LLVM's OpenMP runtime loses some of its own records of threads when teams change their size,
// which is what tests of thread counts do. LeakSanitizer asks this for what not to report.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libomp.so\n"; }
