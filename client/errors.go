package client

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hyperhq/runv/state"
)

// The kinds of errors that callers tell apart, with errors.Is. The message of
// an error that wraps one is the line that a person reads.
var (
	// ErrNotFound: no container has the id.
	ErrNotFound = state.ErrNotFound
	// ErrExists: the id is in use.
	ErrExists = state.ErrExists
	// ErrWrongState: the container is not in a state for what was asked.
	ErrWrongState = errors.New("wrong state of the container")
	// ErrInvalid: the request or the bundle says something that cannot be.
	ErrInvalid = errors.New("invalid request")
	// ErrUnavailable: the supervisor or its VM is gone.
	ErrUnavailable = errors.New("the supervisor or its virtual machine is gone")
	// ErrTimeout: something did not answer in its time.
	ErrTimeout = errors.New("timed out")
	// ErrUnsupported: a virtual machine cannot do it.
	ErrUnsupported = errors.New("not supported")
)

// Error is an error with a kind: its text is the message alone.
type Error struct {
	Message string
	Kind    error
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return e.Kind }

func newError(kind error, format string, a ...any) error {
	return &Error{Message: fmt.Sprintf(format, a...), Kind: kind}
}

// kinds maps the codes of the supervisor's API.
var kinds = map[codes.Code]error{
	codes.NotFound:           ErrNotFound,
	codes.AlreadyExists:      ErrExists,
	codes.FailedPrecondition: ErrWrongState,
	codes.InvalidArgument:    ErrInvalid,
	codes.OutOfRange:         ErrInvalid,
	codes.Unavailable:        ErrUnavailable,
	codes.DeadlineExceeded:   ErrTimeout,
	codes.Unimplemented:      ErrUnsupported,
	codes.Canceled:           context.Canceled,
}

// fromRPC turns the error of a call into one with a kind.
func fromRPC(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if s, ok := answered(err); ok {
		return &Error{Message: s.Message(), Kind: kinds[s.Code()]}
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return newError(ErrUnavailable, "the supervisor ended while it was asked")
	}
	return newError(ErrUnavailable, "ask the supervisor: %v", err)
}

// answered returns what the supervisor said, as opposed to an error of the way
// to it.
func answered(err error) (*status.Status, bool) {
	var s interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &s) {
		return nil, false
	}
	return s.GRPCStatus(), true
}
