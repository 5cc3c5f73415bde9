// This file lets the compiler accept the functions without bodies that
// runtime.go takes from the Go runtime.
