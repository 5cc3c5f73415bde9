// Package ocispec turns the config.json of an OCI bundle into what runv's
// supervisor and guest agent are asked to do. Its functions are pure: they read
// no file, look at no process and keep nothing between calls, so that what a
// container is made of depends on its config.json and the Options alone.
//
// The order of use is Load, Validate, Translate. Every error is one line that
// begins with the field of config.json that is wrong and says what was expected.
//
// The rules are those of the OCI runtime specification 1.3 (config.md and
// config-linux.md); where it leaves a choice, runc's is taken, unless a virtual
// machine makes it meaningless. docs/spec-support.md lists every field.
//
// Nothing may enter this package that needs the host: existence of files, ids of
// users, the devices that a path stands for. Callers inject what is needed
// through Options.
package ocispec
