package containerdshim

import (
	"context"
	"errors"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hyperhq/runv/client"
)

// toGRPC gives an error the code that containerd acts on. The text stays what it
// was: it is what a person reads.
func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, k := range []struct {
		kind error
		code codes.Code
	}{
		{client.ErrNotFound, codes.NotFound},
		{client.ErrExists, codes.AlreadyExists},
		{client.ErrWrongState, codes.FailedPrecondition},
		{client.ErrInvalid, codes.InvalidArgument},
		{client.ErrUnavailable, codes.Unavailable},
		{client.ErrTimeout, codes.DeadlineExceeded},
		{client.ErrUnsupported, codes.Unimplemented},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
	} {
		if errors.Is(err, k.kind) {
			return status.Error(k.code, err.Error())
		}
	}
	return errgrpc.ToGRPC(err)
}

// Errors of the service itself, with the codes that containerd knows.
func notFound(format string, a ...any) error { return status.Errorf(codes.NotFound, format, a...) }

func wrongState(format string, a ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, a...)
}

func exists(format string, a ...any) error { return status.Errorf(codes.AlreadyExists, format, a...) }

func invalid(format string, a ...any) error {
	return status.Errorf(codes.InvalidArgument, format, a...)
}

func unsupported(format string, a ...any) error {
	return status.Errorf(codes.Unimplemented, format, a...)
}

func isNotFound(err error) bool    { return errors.Is(err, client.ErrNotFound) }
func isWrongState(err error) bool  { return errors.Is(err, client.ErrWrongState) }
func isUnavailable(err error) bool { return errors.Is(err, client.ErrUnavailable) }
