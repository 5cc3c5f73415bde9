// Package supervisorv1 is version 1 of the supervisor's local API: messages,
// generated ttrpc code, and the names and limits of its two sockets.
package supervisorv1

const (
	// APIVersion is what Info answers.
	APIVersion = 1
	// APISocket and IOSocket are file names in the pod's state directory.
	APISocket = "api.sock"
	IOSocket  = "io.sock"
	// MaxStreamHeader bounds the encoded StdioHeader, in bytes.
	MaxStreamHeader = 4096
)
